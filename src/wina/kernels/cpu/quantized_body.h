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

WINA_QUANTIZED_INLINE int32_t pair_at(const int16_t* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  return both;
}

// Add x of one step to the sums of the outputs in one vector of codes: sums[i][h], see the layout.
template <int bits>
WINA_QUANTIZED_INLINE void add_step(const uint8_t* codes, int64_t row, const int32_t* rows,
                                    const int16_t* x, int n, const int32_t* next,
                                    Vector* sums) {
  const Vector low = fill16(bits == 4 ? 0x000f : 0x00ff), high = fill16(0x00f0);
  for (int r = 0; r < n; r += 2) {
    const Vector a = load(codes + rows[r] * row), b = load(codes + rows[r + 1] * row);
    __builtin_prefetch(codes + next[r] * row, 0, 2);
    __builtin_prefetch(codes + next[r + 1] * row, 0, 2);
    const Vector values = fill32(pair_at(x + r));
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Vector both = h == 0 ? interleave_low(a, b) : interleave_high(a, b);
      if (bits == 4) {
        sums[h] = multiply_add(sums[h], both & low, values);
        sums[2 + h] = multiply_add(sums[2 + h], both & high, values);  // 16 times the code
        both = shift_right(both, 8);
        sums[4 + h] = multiply_add(sums[4 + h], both & low, values);
        sums[6 + h] = multiply_add(sums[6 + h], both & high, values);
      } else {
        sums[h] = multiply_add(sums[h], shift_signed(shift_left(both, 8), 8), values);
        sums[2 + h] = multiply_add(sums[2 + h], shift_signed(both, 8), values);
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

template <int bits, Zeros zeros>
WINA_QUANTIZED_TARGET static void project_tile(const QuantizedProjection& p, const Step* steps,
                                               int64_t count, const int32_t* rows,
                                               const int16_t* x, int64_t begin, int64_t end,
                                               float* sums) {
  constexpr int64_t outputs = code_block * 8 / bits;
  constexpr int parts = code_block / vector_bytes;  // vectors of a block
  constexpr int kinds = 16 / bits;                  // codes of a word
  for (int64_t s = 0; s < count; ++s) {
    const Step& step = steps[s];
    const int32_t* at = rows + step.first;
    // The rows that follow are fetched meanwhile.
    const int32_t* next = s + 1 < count && steps[s + 1].rows >= step.rows ? at + step.rows : at;
    const int16_t* values = x + step.first;
    const float x_sum = step.scale * float(step.sum);
    const int64_t offset = int64_t(step.group) * p.out;
    for (int64_t c = begin; c < end; c += outputs) {
      const uint8_t* codes = p.codes + c / outputs * code_block;
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) {
        Vector found[2 * kinds];
        // Nibbles are stored 8 above the code.
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kinds; ++i)
          found[i] = bits == 8 ? fill32(0) : fill32(-8 * step.sum * (i / 2 % 2 ? 16 : 1));
        add_step<bits>(codes + part * vector_bytes, p.row, at, values, step.rows, next, found);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kinds; ++i) {
          const int64_t place = c + 16 * i + part * vector_lanes;
          if (place >= end) continue;
          const float by = bits == 4 && i / 2 % 2 ? step.scale / 16 : step.scale;
          const int64_t left = p.out - place;
          Floats sum = to_floats(found[i]) * fill_floats(by);
          if (zeros == Zeros::points)
            sum = sum - points_at(p.zeros, offset + place, left) * fill_floats(x_sum);
          const Floats scale = scales_at(p.scales, p.scales_dtype, offset + place, left);
          Floats total = load_floats(sums + place - begin) + sum * scale;
          if (zeros == Zeros::minima)
            total = total + scales_at(p.zeros, p.scales_dtype, offset + place, left) *
                                fill_floats(x_sum);
          store_floats(sums + place - begin, total);
        }
      }
    }
  }
}

WINA_QUANTIZED_TARGET static void project(const QuantizedProjection& p, const Step* steps,
                                          int64_t count, const int32_t* rows, const int16_t* x,
                                          int64_t begin, int64_t end, float* sums) {
  std::memset(sums, 0, size_t(end - begin + vector_lanes) * sizeof(float));
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
        case Zeros::points: WINA_TILE(8, Zeros::points); break;
        default: WINA_TILE(8, Zeros::minima);
      }
    }
#undef WINA_TILE
  }
}

}  // namespace wina::WINA_QUANTIZED_SPACE
