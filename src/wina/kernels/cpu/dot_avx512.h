// bfloat16: dot products of pairs, with half the instructions of the general way.
// Included by kernels_body.h inside the namespace.
//
// Two rows of W are interleaved, so that a 32-bit lane holds the weights of one column in both;
// the instruction multiplies them with a token's two values and adds both to the column's sum.
// A register of sums then holds columns 0-3, 8-11, 16-19, 24-27 of a block, and its fellow the
// others. The instruction takes subnormal inputs as zero.

template <int tokens, int pairs, bool whole>
WINA_INLINE void add_pairs(const Projection& p, const Live& live, int64_t k, int64_t begin,
                           int64_t columns, float* sums, int64_t stride) {
  const Brain* weight = static_cast<const Brain*>(p.weight) + begin;
  const Brain* row[2 * pairs];
  const Brain* next[2 * pairs];
  constexpr int64_t ahead = tokens == 1 ? 4 * pairs : 2 * pairs;
  alignas(64) uint32_t x[tokens][pairs] = {};
  for (int r = 0; r < 2 * pairs; ++r) {
    // A last row without a fellow is paired with itself, with values of 0.
    int64_t here = k + r < live.count ? k + r : live.count - 1;
    int64_t after = k + r + ahead < live.count ? k + r + ahead : here;
    row[r] = weight + live.index[here] * p.row;
    next[r] = weight + live.index[after] * p.row;
    for (int t = 0; t < tokens && k + r < live.count; ++t) {
      uint32_t bits = read<uint32_t>(live.values + t * live.stride + k + r) >> 16;
      x[t][r / 2] |= bits << (16 * (r % 2));
    }
  }
  const __mmask32 mask = (__mmask32(1) << (columns % block)) - 1;
  for (int64_t c = 0; c < columns; c += block) {
    __m512 a[tokens], b[tokens];
    for (int t = 0; t < tokens; ++t) {
      a[t] = _mm512_loadu_ps(sums + t * stride + c);
      b[t] = _mm512_loadu_ps(sums + t * stride + c + lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < pairs; ++i) {
      __m512i even = whole ? _mm512_loadu_si512(row[2 * i] + c)
                           : _mm512_maskz_loadu_epi16(mask, row[2 * i] + c);
      __m512i odds = whole ? _mm512_loadu_si512(row[2 * i + 1] + c)
                           : _mm512_maskz_loadu_epi16(mask, row[2 * i + 1] + c);
      if (whole) {
        __builtin_prefetch(next[2 * i] + c, 0, 2);
        __builtin_prefetch(next[2 * i + 1] + c, 0, 2);
      }
      __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odds);
      __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odds);
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) {
        __m512bh both = (__m512bh)_mm512_set1_epi32(int(x[t][i]));
        a[t] = _mm512_dpbf16_ps(a[t], low, both);
        b[t] = _mm512_dpbf16_ps(b[t], high, both);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      _mm512_storeu_ps(sums + t * stride + c, a[t]);
      _mm512_storeu_ps(sums + t * stride + c + lanes, b[t]);
    }
  }
}

template <int tokens, bool whole>
WINA_INLINE void add_all_pairs(const Projection& p, const Live& live, int64_t begin,
                               int64_t columns, float* sums, int64_t stride) {
  constexpr int rows = tokens == 1 ? WINA_DOT : 2 * WINA_DOT;  // more tokens: more sums to move
  int64_t k = 0;
  for (; k + rows <= live.count; k += rows)
    add_pairs<tokens, rows / 2, whole>(p, live, k, begin, columns, sums, stride);
  for (; k < live.count; k += 2)
    add_pairs<tokens, 1, whole>(p, live, k, begin, columns, sums, stride);
}

// y = sums + bias, the sums in the order that pairs leave them in.
WINA_INLINE void finish_pairs(const float* sums, const Brain* bias, Brain* y, int64_t columns) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += block) {
    const int64_t n = columns - c < block ? columns - c : int64_t(block);
    const __mmask32 mask = n == block ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
    Floats low = read<Floats>(sums + c), high = read<Floats>(sums + c + lanes);
    if (bias != nullptr) {
      __m512i b = _mm512_maskz_loadu_epi16(mask, bias + c);
      low += (Floats)_mm512_unpacklo_epi16(zero, b);
      high += (Floats)_mm512_unpackhi_epi16(zero, b);
    }
    __m512i rounded = _mm512_packus_epi32((__m512i)(round_brain(low) >> 16),
                                          (__m512i)(round_brain(high) >> 16));
    _mm512_mask_storeu_epi16(y + c, mask, rounded);
  }
}

template <int tokens>
WINA_TARGET static void project_tile_dot(const Projection& p, const Live& live, int real,
                                         int64_t begin, int64_t end, float* sums) {
  int64_t columns = end - begin, rest = columns % block, full = columns - rest;
  int64_t stride = full + (rest ? block : 0) + sums_gap;
  std::memset(sums, 0, tokens * stride * sizeof(float));
  add_all_pairs<tokens, true>(p, live, begin, full, sums, stride);
  if (rest) add_all_pairs<tokens, false>(p, live, begin + full, rest, sums + full, stride);
  const Brain* bias = static_cast<const Brain*>(p.bias);
  for (int t = 0; t < real; ++t)
    finish_pairs(sums + t * stride, bias ? bias + begin : nullptr,
                 static_cast<Brain*>(p.y) + t * p.y_row + begin, columns);
}

// --- dot products with whole rows ---

WINA_INLINE void arrange_brain(const float* from, Brain* to, int64_t in) {
  for (int64_t j = 0; j < in; ++j) to[j].bits = uint16_t(read<uint32_t>(from + j) >> 16);
}

// The sum of each of sixteen registers.
WINA_INLINE __m512 totals(const __m512* v) {
  __m512 pairs[8], fours[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) +
               _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) +
               _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  __m512 left = _mm512_shuffle_f32x4(fours[0], fours[1], 0x88) +
                _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd);
  __m512 right = _mm512_shuffle_f32x4(fours[2], fours[3], 0x88) +
                 _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd);
  return _mm512_shuffle_f32x4(left, right, 0x88) + _mm512_shuffle_f32x4(left, right, 0xdd);
}

WINA_INLINE __m512bh load_brain(const Brain* from) { return (__m512bh)_mm512_loadu_si512(from); }
WINA_INLINE __m512bh load_brain(const Brain* from, int64_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, from);
}

// A long row: the single stream through the weights that the hardware's prefetcher follows best.
WINA_INLINE __m512 brain_row(const Brain* row, const Brain* x, int64_t in) {
  __m512 a{}, b{};
  int64_t c = 0;
  for (; c + 2 * block <= in; c += 2 * block) {
    __builtin_prefetch(row + c + 2048, 0, 2);
    __builtin_prefetch(row + c + 2048 + block, 0, 2);
    a = _mm512_dpbf16_ps(a, load_brain(row + c), load_brain(x + c));
    b = _mm512_dpbf16_ps(b, load_brain(row + c + block), load_brain(x + c + block));
  }
  if (c + block <= in) {
    a = _mm512_dpbf16_ps(a, load_brain(row + c), load_brain(x + c));
    c += block;
  }
  if (c < in) b = _mm512_dpbf16_ps(b, load_brain(row + c, in - c), load_brain(x + c, in - c));
  return a + b;
}

template <int tokens>
WINA_TARGET static void brain_dots(const Brain* weight, int64_t row, const int32_t* index,
                                   const Brain* x, int64_t in, int64_t begin, int64_t end,
                                   float* sums, int64_t stride) {
  constexpr int rows = 16 / tokens;
  const int64_t x_stride = 2 * padded(in), full = in / block * block;
  for (int64_t i = begin; i < end; i += rows) {
    const int real = end - i < rows ? int(end - i) : rows;
    const Brain* at[rows];
    for (int r = 0; r < rows; ++r) {
      const int64_t k = i + (r < real ? r : real - 1);
      at[r] = weight + (index ? index[k] : k) * row;
    }
    __m512 a[16];
    if (tokens == 1 && in >= 256) {
      for (int r = 0; r < rows; ++r) a[r] = brain_row(at[r], x, in);
    } else {
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) a[k] = __m512{};
      for (int64_t c = 0; c < full; c += block)
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          __m512bh w = load_brain(at[r] + c);
#pragma GCC unroll 16
          for (int t = 0; t < tokens; ++t)
            a[t * rows + r] =
                _mm512_dpbf16_ps(a[t * rows + r], w, load_brain(x + t * x_stride + c));
        }
      if (full < in)
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          __m512bh w = load_brain(at[r] + full, in - full);
#pragma GCC unroll 16
          for (int t = 0; t < tokens; ++t)
            a[t * rows + r] =
                _mm512_dpbf16_ps(a[t * rows + r], w, load_brain(x + t * x_stride + full));
        }
    }
    float all[16];
    write(all, totals(a));
    for (int t = 0; t < tokens; ++t)
      std::memcpy(sums + t * stride + i, all + t * rows, size_t(real) * sizeof(float));
  }
}

// --- many tokens: a blocked product with an input-major weight ---
//
// A panel of W is read in long stretches, its rows interleaved in pairs; it stays in the
// second-level cache, and 64 columns of it in the first, while all tokens are multiplied with it.
// The rows of the panel that follows are fetched meanwhile.

constexpr int64_t panel_rows = 192, panel_columns = 1024, strip = 2 * block, step_tokens = 6;
// Between two strips of a panel; a power of two would let them compete for one set of the cache.
constexpr int64_t strip_size = panel_rows * strip + 2 * strip;

// Interleave the pairs of rows of W: 64 columns of all pairs, then the next 64; missing rows and
// columns are zeros.
WINA_TARGET static void pack_panel(const Brain* weight, int64_t row, int64_t rows, int64_t columns,
                                   Brain* packed) {
  for (int64_t k = 0; k < rows; k += 2) {
    const Brain* even = weight + k * row;
    const bool both = k + 1 < rows;
    for (int64_t c = 0; c < columns; c += block) {
      const int64_t n = columns - c < block ? columns - c : int64_t(block);
      const __mmask32 mask = n == block ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
      __m512i a = _mm512_maskz_loadu_epi16(mask, even + c);
      __m512i b = both ? _mm512_maskz_loadu_epi16(mask, even + row + c) : _mm512_setzero_si512();
      Brain* to = packed + c / strip * strip_size + k * strip + c % strip * 2;
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(to + block, _mm512_unpackhi_epi16(a, b));
      if (c % strip == 0 && c + block >= columns) {
        _mm512_storeu_si512(to + strip, _mm512_setzero_si512());
        _mm512_storeu_si512(to + strip + block, _mm512_setzero_si512());
      }
    }
  }
}

// What is fetched while a strip is multiplied: so many lines a pair, along rows of W of which
// `columns` are wanted.
struct Following {
  const Brain* at;
  const Brain* end;  // of the row
  int64_t columns, row;
  int lines;
};

// sums (tokens, 64) += x (tokens, 2 * pairs) times a strip of a panel.
template <int tokens>
WINA_INLINE void multiply_strip(const Brain* x, const Brain* packed, int64_t pairs, float* sums,
                                int64_t stride, bool first, Following following) {
  __m512 a[tokens][4];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      a[t][i] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + t * stride + i * lanes);
  for (int64_t k = 0; k < pairs; ++k) {
    for (int i = 0; i < following.lines; ++i) {
      __builtin_prefetch(following.at, 0, 2);
      following.at += block;
      if (following.at >= following.end) {
        following.end += following.row;
        following.at = following.end - following.columns;
      }
    }
    __m512bh w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) w[i] = load_brain(packed + (k * 4 + i) * block);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const int both = read<int>(x + t * panel_rows + 2 * k);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) a[t][i] = _mm512_dpbf16_ps(a[t][i], w[i], value);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(sums + t * stride + i * lanes, a[t][i]);
}

WINA_TARGET static void multiply_tokens(const Brain* x, int64_t tokens, const Brain* packed,
                                        int64_t pairs, float* sums, int64_t stride, bool first,
                                        Following following) {
  int64_t t = 0;
  for (; t + step_tokens <= tokens; t += step_tokens) {
    multiply_strip<step_tokens>(x + t * panel_rows, packed, pairs, sums + t * stride, stride, first,
                                following);
    following.lines = 0;
  }
  x += t * panel_rows, sums += t * stride;
  switch (tokens - t) {
    case 1: multiply_strip<1>(x, packed, pairs, sums, stride, first, following); break;
    case 2: multiply_strip<2>(x, packed, pairs, sums, stride, first, following); break;
    case 3: multiply_strip<3>(x, packed, pairs, sums, stride, first, following); break;
    case 4: multiply_strip<4>(x, packed, pairs, sums, stride, first, following); break;
    case 5: multiply_strip<5>(x, packed, pairs, sums, stride, first, following); break;
    default: break;
  }
}

WINA_TARGET static void multiply_pairs(const Projection& p, const void* x, int64_t x_stride,
                                       int64_t tokens, int64_t begin, int64_t end, float* sums,
                                       void* panel) {
  const Brain* from = static_cast<const Brain*>(x);
  const Brain* weight = static_cast<const Brain*>(p.weight);
  const Brain* bias = static_cast<const Brain*>(p.bias);
  Brain* packed = static_cast<Brain*>(panel);
  Brain* x_packed = packed + panel_columns / strip * strip_size;
  for (int64_t c = begin; c < end; c += panel_columns) {
    const int64_t columns = end - c < panel_columns ? end - c : panel_columns;
    const int64_t stride = (columns + strip - 1) / strip * strip + 16;
    for (int64_t k = 0; k < p.in; k += panel_rows) {
      const int64_t rows = p.in - k < panel_rows ? p.in - k : panel_rows, pairs = (rows + 1) / 2;
      pack_panel(weight + k * p.row + c, p.row, rows, columns, packed);
      // Rows of x a power of two apart would compete for one set of the cache.
      for (int64_t t = 0; t < tokens; ++t)
        std::memcpy(x_packed + t * panel_rows, from + t * x_stride + k, size_t(4 * pairs));
      const int64_t strips = (columns + strip - 1) / strip;
      const int64_t share = (panel_rows + strips - 1) / strips;  // rows that one strip fetches
      const int64_t lines = (share * ((columns + block - 1) / block) + pairs - 1) / pairs;
      for (int64_t s = 0; s < columns; s += strip) {
        const int64_t next = k + panel_rows + s / strip * share;
        const Brain* at = weight + next * p.row + c;
        // (Past the last row it would leave the weight.)
        Following following{at, at + columns, columns, p.row,
                            next + share <= p.in ? int(lines) : 0};
        multiply_tokens(x_packed, tokens, packed + s / strip * strip_size, pairs, sums + s, stride,
                        k == 0, following);
      }
    }
    for (int64_t t = 0; t < tokens; ++t)
      finish_pairs(sums + t * stride, bias ? bias + c : nullptr,
                   static_cast<Brain*>(p.y) + t * p.y_row + c, columns);
  }
}
