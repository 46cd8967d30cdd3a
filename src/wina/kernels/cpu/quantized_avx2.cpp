// Quantized weights with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>
#define WINA_QUANTIZED_SPACE quantized_avx2_kernels
#define WINA_QUANTIZED_TARGET __attribute__((target("avx2,fma,f16c")))
#include "quantized_steps.h"

namespace wina::WINA_QUANTIZED_SPACE {

typedef uint32_t Vector __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

WINA_QUANTIZED_INLINE Vector load(const void* from) {
  return (Vector)_mm256_loadu_si256(static_cast<const __m256i*>(from));
}
WINA_QUANTIZED_INLINE Vector fill16(int value) { return (Vector)_mm256_set1_epi16(short(value)); }
WINA_QUANTIZED_INLINE Vector fill32(int32_t value) { return (Vector)_mm256_set1_epi32(value); }
WINA_QUANTIZED_INLINE Vector interleave_low(Vector a, Vector b) {
  return (Vector)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
}
WINA_QUANTIZED_INLINE Vector interleave_high(Vector a, Vector b) {
  return (Vector)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
}
WINA_QUANTIZED_INLINE Vector shift_right(Vector v, int n) {
  return (Vector)_mm256_srli_epi16((__m256i)v, n);
}
WINA_QUANTIZED_INLINE Vector shift_left(Vector v, int n) {
  return (Vector)_mm256_slli_epi16((__m256i)v, n);
}
WINA_QUANTIZED_INLINE Vector shift_signed(Vector v, int n) {
  return (Vector)_mm256_srai_epi16((__m256i)v, n);
}
WINA_QUANTIZED_INLINE Vector multiply_add(Vector sum, Vector codes, Vector values) {
  return sum + (Vector)_mm256_madd_epi16((__m256i)codes, (__m256i)values);
}
WINA_QUANTIZED_INLINE Floats to_floats(Vector v) {
  return (Floats)_mm256_cvtepi32_ps((__m256i)v);
}
WINA_QUANTIZED_INLINE Floats fill_floats(float value) { return (Floats)_mm256_set1_ps(value); }
WINA_QUANTIZED_INLINE Floats load_floats(const float* from) {
  return (Floats)_mm256_loadu_ps(from);
}
WINA_QUANTIZED_INLINE void store_floats(float* to, Floats v) { _mm256_storeu_ps(to, (__m256)v); }
WINA_QUANTIZED_INLINE Floats load_scales(const void* from, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return load_floats(static_cast<const float*>(from) + i);
  const __m128i half =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i));
  if (dtype == Dtype::f16) return (Floats)_mm256_cvtph_ps(half);
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}
WINA_QUANTIZED_INLINE Floats load_points(const int8_t* from) {
  const __m128i points = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(points));
}

}  // namespace wina::WINA_QUANTIZED_SPACE

#include "quantized_body.h"

namespace wina {
const QuantizedKernels quantized_avx2{WINA_QUANTIZED_SPACE::prepare,
                                      WINA_QUANTIZED_SPACE::project};
}
#endif
