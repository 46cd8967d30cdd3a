// Conversions and compaction with AVX-512; see vectors.h.

namespace wina::WINA_SPACE {

WINA_INLINE Floats widen_half(const Half* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

WINA_INLINE void narrow_half(Half* to, Floats value) {
  __m256i half = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}

WINA_INLINE float total(Floats value) { return _mm512_reduce_add_ps((__m512)value); }

// The compressing store is microcoded on some processors: compress in a register and store it
// whole. The lists have room for that.
WINA_INLINE int64_t compact_lanes(const float* wide, int real, int64_t in,
                                  const float* thresholds, Live* live, int64_t* count) {
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t n = *count, j = 0;
  for (; j + lanes <= in; j += lanes) {
    __m512 threshold = _mm512_loadu_ps(thresholds + j);
    __m512 x[max_tokens];
    __mmask16 any = 0;
    for (int t = 0; t < real; ++t) {
      __m512 value = _mm512_loadu_ps(wide + t * in + j);
      __mmask16 keep = _mm512_cmp_ps_mask(_mm512_abs_ps(value), threshold, _CMP_NLT_UQ);
      keep = _mm512_mask_cmp_ps_mask(keep, value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      x[t] = _mm512_maskz_mov_ps(keep, value);
      any |= keep;
    }
    _mm512_storeu_si512(live->index + n, _mm512_maskz_compress_epi32(any, index));
    for (int t = 0; t < real; ++t)
      _mm512_storeu_ps(live->values + t * live->stride + n, _mm512_maskz_compress_ps(any, x[t]));
    n += __builtin_popcount(any);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(lanes));
  }
  *count = n;
  return j;
}

}  // namespace wina::WINA_SPACE
