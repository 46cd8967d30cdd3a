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
constexpr int64_t blocks_at_once = vector_bytes / 32;
constexpr int64_t ahead = 32;  // rows between one that is read and one that is fetched

WINA_QUANTIZED_INLINE int32_t pair_at(const int16_t* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  return both;
}

// Add x of one step to the sums of the outputs in `wide` vectors of codes, which begin `offset`
// bytes into the rows and whose blocks are `block` bytes apart: sums[i][h] of each vector, see the
// layout. With `fetch` the rows in `next` are fetched meanwhile.
template <int bits, int wide, bool fetch>
WINA_QUANTIZED_INLINE void add_step(const uint8_t* const* rows, const uint8_t* const* next, int n,
                                    const int16_t* x, int64_t offset, int64_t block,
                                    Vector (&sums)[wide * 32 / bits]) {
  constexpr int each = 32 / bits;
  const Vector low = fill16(bits == 4 ? 0x000f : 0x00ff), high = fill16(0x00f0);
  for (int r = 0; r < n; r += 2) {
    const uint8_t *a = rows[r] + offset, *b = rows[r + 1] + offset;
    const uint8_t *c = next[r] + offset, *d = next[r + 1] + offset;
    const Vector values = fill32(pair_at(x + r));
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) {
      constexpr int parts = code_block / vector_bytes;
      const int64_t place = v / parts * block + v % parts * vector_bytes;
      const Vector one = load(a + place), other = load(b + place);
      if (fetch && v % parts == 0) {
        __builtin_prefetch(c + place, 0, 2);
        __builtin_prefetch(d + place, 0, 2);
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

// Scales (or minima, or zero points) from number i on; `whole` if all of a register's are there,
// else `left` and then zeros.
template <Dtype dtype, bool whole>
WINA_QUANTIZED_INLINE Floats scales_at(const void* from, int64_t i, int64_t left) {
  if (whole || left >= vector_lanes) return load_scales(from, dtype, i);
  float part[vector_lanes] = {};
  for (int64_t k = 0; k < left; ++k) part[k] = scale_at(from, dtype, i + k);
  return load_floats(part);
}
template <bool whole>
WINA_QUANTIZED_INLINE Floats points_at(const void* from, int64_t i, int64_t left) {
  const int8_t* points = static_cast<const int8_t*>(from) + i;
  if (whole || left >= vector_lanes) return load_points(points);
  float part[vector_lanes] = {};
  for (int64_t k = 0; k < left; ++k) part[k] = points[k];
  return load_floats(part);
}

// Fetch the scales (and zeros) of `count` outputs in a group.
template <Zeros zeros, Dtype dtype>
WINA_QUANTIZED_INLINE void fetch_scales(const QuantizedProjection& p, int64_t group, int64_t first,
                                        int64_t count) {
  if (group >= p.groups) return;
  const int64_t width = bytes_of(dtype), place = group * p.out + first;
  auto fetch = [&](const void* from, int64_t bytes) __attribute__((always_inline)) {
    const char* at = static_cast<const char*>(from) + place * bytes;
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  };
  fetch(p.scales, width);
  if (zeros != Zeros::none) fetch(p.zeros, zeros == Zeros::points ? 1 : width);
}

// Add a step to the float32 sums of outputs from c on, in `wide` vectors, the first of which is
// number `part` of its block; `whole` if all of their outputs are below `end`.
template <int bits, Zeros zeros, Dtype dtype, int wide, int part, bool whole>
WINA_QUANTIZED_INLINE void add_vectors(const QuantizedProjection& p, const Step& step,
                                       const uint8_t* const* rows, const uint8_t* const* next,
                                       const int16_t* x, int64_t c, int64_t end, float* sums) {
  constexpr int64_t outputs = code_block * 8 / bits;
  constexpr int each = 32 / bits, parts = code_block / vector_bytes;
  Vector found[wide * each];
  // Nibbles are stored 8 above the code, as formats with minima want them.
  const bool above = bits == 4 && zeros != Zeros::minima;
#pragma GCC unroll 32
  for (int i = 0; i < wide * each; ++i)
    found[i] = above ? fill32(-8 * step.sum * (i % each / 2 % 2 ? 16 : 1)) : fill32(0);
  add_step<bits, wide, part == 0>(rows, next, step.rows, x,
                                  c / outputs * p.block + part * vector_bytes, p.block, found);
  const float x_sum = step.scale * float(step.sum);
  const int64_t group = int64_t(step.group) * p.out;
  if (part == 0)  // of the block's other vectors, too
    fetch_scales<zeros, dtype>(p, step.group + 2, c, (wide + parts - 1) / parts * outputs);
#pragma GCC unroll 32
  for (int i = 0; i < wide * each; ++i) {
    const int v = part + i / each;
    const int64_t place = c + v / parts * outputs + 16 * (i % each) + v % parts * vector_lanes;
    if (!whole && place >= end) continue;
    const float by = bits == 4 && i % each / 2 % 2 ? step.scale / 16 : step.scale;
    const int64_t left = p.out - place;
    float* to = sums + place;
    Floats sum = to_floats(found[i]) * fill_floats(by);
    if (zeros == Zeros::points)
      sum = sum - points_at<whole>(p.zeros, group + place, left) * fill_floats(x_sum);
    Floats total = load_floats(to) + sum * scales_at<dtype, whole>(p.scales, group + place, left);
    if (zeros == Zeros::minima)
      total = total + scales_at<dtype, whole>(p.zeros, group + place, left) * fill_floats(x_sum);
    store_floats(to, total);
  }
}

// The same for all outputs of the blocks that `wide` vectors touch.
template <int bits, Zeros zeros, Dtype dtype, int wide, bool whole>
WINA_QUANTIZED_INLINE void add_blocks(const QuantizedProjection& p, const Step& step,
                                      const uint8_t* const* rows, const uint8_t* const* next,
                                      const int16_t* x, int64_t c, int64_t end, float* sums) {
  add_vectors<bits, zeros, dtype, wide, 0, whole>(p, step, rows, next, x, c, end, sums);
  if (wide * vector_bytes < code_block)
    add_vectors<bits, zeros, dtype, wide, 1, whole>(p, step, rows, next, x, c, end, sums);
}

template <int bits, Zeros zeros, Dtype dtype>
WINA_QUANTIZED_TARGET static void project_tile(const QuantizedProjection& p, const Step* steps,
                                               int64_t count, const int32_t* rows,
                                               const int16_t* x, int64_t begin, int64_t end,
                                               float* sums) {
  constexpr int64_t outputs = code_block * 8 / bits;
  // As many vectors as registers hold the sums of: two of 512 bits, of 256 bits two or one.
  constexpr int wide = vector_bytes == 64 || bits == 8 ? 2 : 1;
  constexpr int64_t step_outputs = blocks_at_once * outputs;
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
    for (; c + step_outputs <= end; c += step_outputs)
      add_blocks<bits, zeros, dtype, wide, true>(p, step, at, next, values, c, end, sums - begin);
    for (; c < end; c += outputs)
      add_blocks<bits, zeros, dtype, vector_bytes == 64 ? 1 : wide, false>(
          p, step, at, next, values, c, end, sums - begin);
  }
}

WINA_QUANTIZED_TARGET static void project(const QuantizedProjection& p, const Step* steps,
                                          int64_t count, const int32_t* rows, const int16_t* x,
                                          int64_t begin, int64_t end, float* sums) {
  const int64_t whole = (end - begin + vector_lanes - 1) / vector_lanes * vector_lanes;
  std::memset(sums, 0, size_t(whole) * sizeof(float));
  // Where a block's codes of all channels lie together, block by block is how memory is read.
  const int64_t tile =
      p.block == code_block ? tile_outputs : blocks_at_once * block_outputs(p.bits);
  for (int64_t c = begin; c < end; c += tile) {
    const int64_t stop = c + tile < end ? c + tile : end;
    float* to = sums + (c - begin);
#define WINA_TILE(bits, zeros)                                                              \
  (p.scales_dtype == Dtype::f32   ? project_tile<bits, zeros, Dtype::f32>                   \
   : p.scales_dtype == Dtype::f16 ? project_tile<bits, zeros, Dtype::f16>                   \
                                  : project_tile<bits, zeros, Dtype::bf16>)(               \
      p, steps, count, rows, x, c, stop, to)
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
