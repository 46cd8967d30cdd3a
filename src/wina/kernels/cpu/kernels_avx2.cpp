// x86-64 of 2013 and later: AVX2, FMA, F16C.
#if defined(__x86_64__)
#include <immintrin.h>
#define WINA_ISA avx2
#define WINA_SPACE avx2_kernels
#define WINA_TARGET __attribute__((target("avx2,fma,f16c")))
#define WINA_LANES 8
#include "vectors.h"

namespace wina::WINA_SPACE {

WINA_INLINE Floats widen_half(const Half* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

WINA_INLINE void narrow_half(Half* to, Floats value) {
  __m128i half = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
}

WINA_INLINE float total(Floats value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)value),
                           _mm256_extractf128_ps((__m256)value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

WINA_INLINE int64_t compact_lanes(const float*, int, int64_t, const float*, Live*, int64_t*) {
  return 0;
}

}  // namespace wina::WINA_SPACE

#include "kernels_body.h"
#endif
