// What the operators on quantized weights (quantized_ops.h) ask of an instruction set
// (quantized_*.cpp). The layout of the weights is that of wina/kernels/quantized.py. No torch here.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace wina {

constexpr int64_t code_block = 64;  // bytes
// Live channels of a step: their rows are summed as integers before they are scaled.
constexpr int most_rows = 32;

// Some live channels of one group; `rows` is even, a last one without a fellow has itself with 0.
struct Step {
  int64_t first;  // in the lists of rows and values
  int32_t rows;
  int32_t group;
  float scale;    // of the integers that stand for x
  int32_t sum;    // of those integers
};

// How zeros are stored: none, zero points z of s (q - z), or (4 bits) minima m of s (q + 8) + m.
enum class Zeros : int { none, points, minima };

struct QuantizedProjection {
  const uint8_t* codes;
  int64_t row;           // bytes from a channel's codes to the next one's
  int64_t block;         // bytes from a block of codes to the next one of the same channel
  int bits;              // 8 or 4
  const void* scales;    // (groups, out)
  Dtype scales_dtype;
  const void* zeros;     // (groups, out), int8 or the scales' dtype
  Zeros zeros_kind;
  int64_t in, out, groups;
};

// Outputs of a block of codes; a split of outputs over threads falls on multiples of 128.
inline int64_t block_outputs(int bits) { return code_block * 8 / bits; }
constexpr int64_t quantized_split = 128;

struct QuantizedKernels {
  // Turn live channels (index, value) into steps: at most 16 bits stand for a value in each of
  // `passes` passes. `rows` and `x` have room for passes * (2 * count + 2), `steps` for
  // passes * (count + 1). Return the number of steps.
  int64_t (*prepare)(const int32_t* index, const float* values, int64_t count, int64_t group,
                     int passes, int32_t* rows, int16_t* x, Step* steps);
  // sums[i - begin] = output i, i in [begin, end), begin a multiple of quantized_split; room for
  // 128 more.
  void (*project)(const QuantizedProjection&, const Step* steps, int64_t count,
                  const int32_t* rows, const int16_t* x, int64_t begin, int64_t end, float* sums);
};

extern const QuantizedKernels quantized_portable;
#if defined(__x86_64__)
extern const QuantizedKernels quantized_avx2, quantized_avx512, quantized_avx512_vnni;
#endif

}  // namespace wina
