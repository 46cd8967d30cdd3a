// Quantized weights on any machine: loops that a compiler can turn into vectors.
#define WINA_QUANTIZED_SPACE quantized_portable_kernels
#define WINA_QUANTIZED_TARGET
#include "quantized_steps.h"

namespace wina::WINA_QUANTIZED_SPACE {

// Add a row's block times x to the sums, which are ordered by code of a word, then by word.
template <int bits>
static void add_row(const uint8_t* codes, int32_t x, int32_t* sums) {
  constexpr int words = code_block / 2;
  for (int w = 0; w < words; ++w) {
    const uint32_t word = uint32_t(codes[2 * w]) | uint32_t(codes[2 * w + 1]) << 8;
    for (int i = 0; i < 16 / bits; ++i) {
      const int32_t code =
          bits == 4 ? int32_t(word >> (4 * i) & 15) - 8 : int8_t(word >> (8 * i) & 255);
      sums[i * words + w] += code * x;
    }
  }
}

static void project(const QuantizedProjection& p, const Step* steps, int64_t count,
                    const int32_t* rows, const int16_t* x, int64_t begin, int64_t end,
                    float* sums) {
  constexpr int words = code_block / 2;
  const int64_t outputs = block_outputs(p.bits);
  std::memset(sums, 0, size_t(end - begin) * sizeof(float));
  for (int64_t s = 0; s < count; ++s) {
    const Step& step = steps[s];
    const int64_t offset = int64_t(step.group) * p.out;
    for (int64_t c = begin; c < end; c += outputs) {
      int32_t found[4 * words] = {};
      for (int32_t r = 0; r < step.rows; ++r) {
        const uint8_t* codes =
            p.codes + rows[step.first + r] * p.row + c / outputs * p.block;
        if (p.bits == 4) add_row<4>(codes, x[step.first + r], found);
        else add_row<8>(codes, x[step.first + r], found);
      }
      for (int i = 0; i < 16 / p.bits; ++i)
        for (int w = 0; w < words; ++w) {
          const int64_t place = c + 16 * (2 * i + w / 4 % 2) + 4 * (w / 8) + w % 4;
          if (place >= end) continue;
          float sum = step.scale * float(found[i * words + w]);
          const float x_sum = step.scale * float(step.sum);
          if (p.zeros_kind == Zeros::points)
            sum -= float(static_cast<const int8_t*>(p.zeros)[offset + place]) * x_sum;
          float& total = sums[place - begin];
          total += sum * scale_at(p.scales, p.scales_dtype, offset + place);
          if (p.zeros_kind == Zeros::minima)
            total += scale_at(p.zeros, p.scales_dtype, offset + place) * x_sum +
                     8 * x_sum * scale_at(p.scales, p.scales_dtype, offset + place);
        }
    }
  }
}

}  // namespace wina::WINA_QUANTIZED_SPACE

namespace wina {
const QuantizedKernels quantized_portable{WINA_QUANTIZED_SPACE::prepare,
                                          WINA_QUANTIZED_SPACE::project};
}
