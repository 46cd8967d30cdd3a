// x86-64 with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#include <immintrin.h>
#define WINA_ISA avx512
#define WINA_SPACE avx512_kernels
#define WINA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define WINA_LANES 16
#include "vectors.h"
#include "compact_avx512.h"
#include "kernels_body.h"
#endif
