// The kernel on quantized weights, written once for registers of 256 and 512 bits.
//
// Rows of two live channels are interleaved word by word, so that a 32-bit lane holds both
// channels' codes of the same outputs: four nibbles or two bytes of each. Masked (or shifted) into
// 16-bit halves, one instruction multiplies them with the two channels' values and adds both to
// the outputs' sums. The sums stay in registers over the rows of a step, which are of one group;
// then they are scaled and added to the float32 sums.
//
// A quantized_*.cpp defines WINA_QUANTIZED_SPACE, WINA_QUANTIZED_TARGET, the type Vector, Floats of
// as many bits, and the functions on them used below; then it includes this file.

namespace wina::WINA_QUANTIZED_SPACE {

constexpr int vector_bytes = sizeof(Vector);
constexpr int vector_lanes = vector_bytes / 4;
constexpr int64_t tile_outputs = 4096;  // float32 sums that stay in a first-level cache
constexpr int64_t ahead = 32;  // rows between one that is read and one that is fetched

WINA_QUANTIZED_INLINE int32_t pair_at(const int16_t* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  return both;
}

// Add x of one step to the sums of the outputs in `wide` vectors of codes, which begin `offset`
// bytes into the rows: sums[i][h] of each vector, see the layout. The rows in `next` are fetched
// meanwhile.
template <int bits, int wide>
WINA_QUANTIZED_INLINE void add_step(const uint8_t* const* rows, const uint8_t* const* next, int n,
                                    const int16_t* x, int64_t offset,
                                    Vector (&sums)[wide * 32 / bits]) {
  constexpr int each = 32 / bits;
  const Vector low = fill16(bits == 4 ? 0x000f : 0x00ff), high = fill16(0x00f0);
  for (int r = 0; r < n; r += 2) {
    const uint8_t *a = rows[r] + offset, *b = rows[r + 1] + offset;
    const uint8_t *c = next[r] + offset, *d = next[r + 1] + offset;
    const Vector values = fill32(pair_at(x + r));
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) {
      const Vector one = load(a + v * vector_bytes), other = load(b + v * vector_bytes);
      if (v * vector_bytes % 64 == 0) {
        __builtin_prefetch(c + v * vector_bytes, 0, 2);
        __builtin_prefetch(d + v * vector_bytes, 0, 2);
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int i = v * each + h;
        Vector both = h == 0 ? interleave_low(one, other) : interleave_high(one, other);
        if (bits == 4) {
          sums[i] = multiply_add(sums[i], both & low, values);
          sums[i + 2] = multiply_add(sums[i + 2], both & high, values);  // 16 times the code
          both = shift_right(both, 8);
          sums[i + 4] = multiply_add(sums[i + 4], both & low, values);
          sums[i + 6] = multiply_add(sums[i + 6], both & high, values);
        } else {
          sums[i] = multiply_add(sums[i], shift_signed(shift_left(both, 8), 8), values);
          sums[i + 2] = multiply_add(sums[i + 2], shift_signed(both, 8), values);
        }
      }
    }
  }
}

// `left` scales (or minima, or zero points) from number i on; beyond `left` zeros.
WINA_QUANTIZED_INLINE Floats scales_at(const void* from, Dtype dtype, int64_t i, int64_t left) {
  if (left >= vector_lanes) return load_scales(from, dtype, i);
  float part[vector_lanes] = {};
  for (int64_t k = 0; k < left; ++k) part[k] = scale_at(from, dtype, i + k);
  return load_floats(part);
}
WINA_QUANTIZED_INLINE Floats points_at(const void* from, int64_t i, int64_t left) {
  const int8_t* points = static_cast<const int8_t*>(from) + i;
  if (left >= vector_lanes) return load_points(points);
  float part[vector_lanes] = {};
  for (int64_t k = 0; k < left; ++k) part[k] = points[k];
  return load_floats(part);
}

// Fetch the scales (and zeros) of `count` outputs in a group.
template <Zeros zeros>
WINA_QUANTIZED_INLINE void fetch_scales(const QuantizedProjection& p, int64_t group, int64_t first,
                                        int64_t count) {
  if (group >= p.groups) return;
  const int64_t width = bytes_of(p.scales_dtype), place = group * p.out + first;
  auto fetch = [&](const void* from, int64_t bytes) __attribute__((always_inline)) {
    const char* at = static_cast<const char*>(from) + place * bytes;
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  };
  fetch(p.scales, width);
  if (zeros != Zeros::none) fetch(p.zeros, zeros == Zeros::points ? 1 : width);
}

// Add a step to the float32 sums of outputs [c, end) in `wide` vectors; part is the first vector's
// place in its block.
template <int bits, Zeros zeros, int wide>
WINA_QUANTIZED_INLINE void add_vectors(const QuantizedProjection& p, const Step& step,
                                       const uint8_t* const* rows, const uint8_t* const* next,
                                       const int16_t* x, int64_t c, int part, int64_t end,
                                       float* sums) {
  constexpr int64_t outputs = code_block * 8 / bits;
  constexpr int each = 32 / bits, parts = code_block / vector_bytes;
  Vector found[wide * each];
  // Nibbles are stored 8 above the code, as formats with minima want them.
  const bool above = bits == 4 && zeros != Zeros::minima;
#pragma GCC unroll 32
  for (int i = 0; i < wide * each; ++i)
    found[i] = above ? fill32(-8 * step.sum * (i % each / 2 % 2 ? 16 : 1)) : fill32(0);
  add_step<bits, wide>(rows, next, step.rows, x,
                       c / outputs * code_block + part * vector_bytes, found);
  const float x_sum = step.scale * float(step.sum);
  const int64_t group = int64_t(step.group) * p.out;
  fetch_scales<zeros>(p, step.group + 2, c, wide * outputs);
#pragma GCC unroll 32
  for (int i = 0; i < wide * each; ++i) {
    const int v = part + i / each;
    const int64_t place = c + v / parts * outputs + 16 * (i % each) + v % parts * vector_lanes;
    if (place >= end) continue;
    const float by = bits == 4 && i % each / 2 % 2 ? step.scale / 16 : step.scale;
    const int64_t left = p.out - place;
    float* to = sums + place;
    Floats sum = to_floats(found[i]) * fill_floats(by);
    if (zeros == Zeros::points)
      sum = sum - points_at(p.zeros, group + place, left) * fill_floats(x_sum);
    Floats total =
        load_floats(to) + sum * scales_at(p.scales, p.scales_dtype, group + place, left);
    if (zeros == Zeros::minima)
      total = total + scales_at(p.zeros, p.scales_dtype, group + place, left) * fill_floats(x_sum);
    store_floats(to, total);
  }
}

template <int bits, Zeros zeros>
WINA_QUANTIZED_TARGET static void project_tile(const QuantizedProjection& p, const Step* steps,
                                               int64_t count, const int32_t* rows,
                                               const int16_t* x, int64_t begin, int64_t end,
                                               float* sums) {
  constexpr int64_t outputs = code_block * 8 / bits;
  constexpr int parts = code_block / vector_bytes;  // vectors of a block
  const int64_t all = count > 0 ? steps[count - 1].first + steps[count - 1].rows : 0;
  const uint8_t *at[most_rows], *next[most_rows];
  for (int64_t s = 0; s < count; ++s) {
    const Step& step = steps[s];
    for (int32_t r = 0; r < step.rows; ++r) {
      const int64_t k = step.first + r;
      at[r] = p.codes + rows[k] * p.row;
      next[r] = k + ahead < all ? p.codes + rows[k + ahead] * p.row : at[r];
    }
    const int16_t* values = x + step.first;
    int64_t c = begin;
    if (parts == 1)  // the registers of 512 bits suffice for two
      for (; c + outputs < end; c += 2 * outputs)
        add_vectors<bits, zeros, 2>(p, step, at, next, values, c, 0, end, sums - begin);
    for (; c < end; c += outputs)
      for (int part = 0; part < parts; ++part)
        add_vectors<bits, zeros, 1>(p, step, at, next, values, c, part, end, sums - begin);
  }
}

WINA_QUANTIZED_TARGET static void project(const QuantizedProjection& p, const Step* steps,
                                          int64_t count, const int32_t* rows, const int16_t* x,
                                          int64_t begin, int64_t end, float* sums) {
  const int64_t whole = (end - begin + vector_lanes - 1) / vector_lanes * vector_lanes;
  std::memset(sums, 0, size_t(whole) * sizeof(float));
  for (int64_t c = begin; c < end; c += tile_outputs) {
    const int64_t stop = c + tile_outputs < end ? c + tile_outputs : end;
    float* to = sums + (c - begin);
#define WINA_TILE(bits, zeros) \
  project_tile<bits, zeros>(p, steps, count, rows, x, c, stop, to)
    if (p.bits == 4) {
      switch (p.zeros_kind) {
        case Zeros::none: WINA_TILE(4, Zeros::none); break;
        case Zeros::points: WINA_TILE(4, Zeros::points); break;
        default: WINA_TILE(4, Zeros::minima);
      }
    } else {
      switch (p.zeros_kind) {
        case Zeros::none: WINA_TILE(8, Zeros::none); break;
        default: WINA_TILE(8, Zeros::points);
      }
    }
#undef WINA_TILE
  }
}

}  // namespace wina::WINA_QUANTIZED_SPACE
