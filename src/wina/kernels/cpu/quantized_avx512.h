// Registers of 512 bits for quantized_body.h.
#include <immintrin.h>

#include "quantized_steps.h"

namespace wina::WINA_QUANTIZED_SPACE {

typedef uint32_t Vector __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

WINA_QUANTIZED_INLINE Vector load(const void* from) { return (Vector)_mm512_loadu_si512(from); }
WINA_QUANTIZED_INLINE Vector fill16(int value) { return (Vector)_mm512_set1_epi16(short(value)); }
WINA_QUANTIZED_INLINE Vector fill32(int32_t value) { return (Vector)_mm512_set1_epi32(value); }
WINA_QUANTIZED_INLINE Vector interleave_low(Vector a, Vector b) {
  return (Vector)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
}
WINA_QUANTIZED_INLINE Vector interleave_high(Vector a, Vector b) {
  return (Vector)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
WINA_QUANTIZED_INLINE Vector shift_right(Vector v, int n) {
  return (Vector)_mm512_srli_epi16((__m512i)v, unsigned(n));
}
WINA_QUANTIZED_INLINE Vector shift_left(Vector v, int n) {
  return (Vector)_mm512_slli_epi16((__m512i)v, unsigned(n));
}
WINA_QUANTIZED_INLINE Vector shift_signed(Vector v, int n) {
  return (Vector)_mm512_srai_epi16((__m512i)v, unsigned(n));
}
WINA_QUANTIZED_INLINE Vector multiply_add(Vector sum, Vector codes, Vector values) {
#ifdef WINA_VNNI
  return (Vector)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, (__m512i)values);
#else
  return sum + (Vector)_mm512_madd_epi16((__m512i)codes, (__m512i)values);
#endif
}
WINA_QUANTIZED_INLINE Floats to_floats(Vector v) {
  return (Floats)_mm512_cvtepi32_ps((__m512i)v);
}
WINA_QUANTIZED_INLINE Floats fill_floats(float value) { return (Floats)_mm512_set1_ps(value); }
WINA_QUANTIZED_INLINE Floats load_floats(const float* from) {
  return (Floats)_mm512_loadu_ps(from);
}
WINA_QUANTIZED_INLINE void store_floats(float* to, Floats v) { _mm512_storeu_ps(to, (__m512)v); }
WINA_QUANTIZED_INLINE Floats load_scales(const void* from, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return load_floats(static_cast<const float*>(from) + i);
  const __m256i half = _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + i));
  if (dtype == Dtype::f16) return (Floats)_mm512_cvtph_ps(half);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
WINA_QUANTIZED_INLINE Floats load_points(const int8_t* from) {
  const __m128i points = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(points));
}

}  // namespace wina::WINA_QUANTIZED_SPACE

#include "quantized_body.h"
