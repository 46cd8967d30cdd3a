// x86-64 with AVX-512 F, BW, DQ, VL and BF16.
#if defined(__x86_64__)
#include <immintrin.h>
#define WINA_ISA avx512_bf16
#define WINA_SPACE avx512_bf16_kernels
#define WINA_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")))
#define WINA_LANES 16
#define WINA_DOT 8  // rows of a step
#include "vectors.h"
#include "compact_avx512.h"
#include "kernels_body.h"
#endif
