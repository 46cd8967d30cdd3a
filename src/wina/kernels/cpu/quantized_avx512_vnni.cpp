// Quantized weights with AVX-512 F, BW, DQ, VL and VNNI.
#if defined(__x86_64__)
#define WINA_QUANTIZED_SPACE quantized_avx512_vnni_kernels
#define WINA_QUANTIZED_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define WINA_VNNI
#include "quantized_avx512.h"

namespace wina {
const QuantizedKernels quantized_avx512_vnni{WINA_QUANTIZED_SPACE::prepare,
                                             WINA_QUANTIZED_SPACE::project};
}
#endif
