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

// For each set of eight lanes, the numbers of its lanes, lowest first.
struct Order {
  uint8_t of[256][8] = {};
  constexpr Order() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (set >> lane & 1) of[set][n++] = uint8_t(lane);
  }
};
static constexpr Order order;

// Whole registers are stored: the lists have room for that.
WINA_INLINE int64_t compact_lanes(const float* wide, int real, int64_t in,
                                  const float* thresholds, Live* live, int64_t* count) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  int64_t n = *count, j = 0;
  for (; j + lanes <= in; j += lanes) {
    const __m256 threshold = _mm256_loadu_ps(thresholds + j);
    __m256 x[max_tokens];
    int any = 0;
    for (int t = 0; t < real; ++t) {
      const __m256 value = _mm256_loadu_ps(wide + t * in + j);
      const __m256 keep = _mm256_and_ps(
          _mm256_cmp_ps(_mm256_andnot_ps(sign, value), threshold, _CMP_NLT_UQ),
          _mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_NEQ_UQ));
      x[t] = _mm256_and_ps(value, keep);
      any |= _mm256_movemask_ps(keep);
    }
    const __m256i from = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(order.of[any])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(live->index + n),
                        _mm256_permutevar8x32_epi32(index, from));
    for (int t = 0; t < real; ++t)
      _mm256_storeu_ps(live->values + t * live->stride + n,
                       _mm256_permutevar8x32_ps(x[t], from));
    n += __builtin_popcount(unsigned(any));
    index = _mm256_add_epi32(index, _mm256_set1_epi32(lanes));
  }
  *count = n;
  return j;
}

}  // namespace wina::WINA_SPACE

#include "kernels_body.h"
#endif
