// What the operators (ops.cpp) ask of an instruction set (kernels_*.cpp). No torch here.
#pragma once

#include <cstdint>

namespace wina {

// Rows of W are skipped for the first three; float64 takes the dense path.
enum class Dtype : int { f32, f16, bf16, f64 };
enum class Activation : int { silu, gelu, gelu_tanh, relu };

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// Tokens of one pass over the weights; more are computed in several passes.
constexpr int max_tokens = 8;
// float32 sums of one tile of outputs, all tokens together: 32 KiB stays in a first-level cache.
constexpr int64_t tile_sums = 8192;
// A split of outputs over threads falls on multiples of this: 64 bytes of 16-bit weights.
constexpr int64_t split_columns = 32;

// The channels that a projection reads: those which at least one token keeps.
struct Live {
  int32_t* index;   // (count,) ascending
  float* values;    // (tokens, stride): x, or 0 where that token drops the channel
  int64_t stride;
  int64_t count;
  int tokens;       // 1, 2, 4 or 8; tokens beyond the real ones have zero values
};

struct Projection {
  const void* weight;  // (in, out), rows contiguous and `row` elements apart
  const void* bias;    // (out,) or null
  void* y;             // (rows, out), rows contiguous and `y_row` elements apart
  int64_t in, out, row, y_row;
};

// Floats of a row that is laid out for `dots`.
inline int64_t padded(int64_t in) { return (in + 31) / 32 * 32; }

// Tokens that `multiply` takes at a time, and the room that it needs: bytes of a panel of W and of
// x, and floats of sums for each token.
constexpr int64_t product_tokens = 256;
constexpr int64_t panel_bytes = (192 * (1024 + product_tokens) + 16 * 128) * 2;
constexpr int64_t panel_sums = 1024 + 16;

struct Kernels {
  const char* name;
  // Widen n values.
  void (*widen)(Dtype, const void* x, float* wide, int64_t n);
  // List the channels of wide (real, in) that are not below the thresholds, in `live`, whose
  // pointers, stride and tokens are set; real <= live.tokens.
  void (*compact)(const float* wide, int real, int64_t in, const float* thresholds, Live* live);
  // y[token, begin:end] = sum over live channels, + bias; sums has room for tile_sums + 128 *
  // max_tokens floats and is aligned to 64 bytes. begin is a multiple of split_columns.
  void (*project)(Dtype, const Projection&, const Live&, int real, int64_t begin, int64_t end,
                  float* sums);
  // gate = act(gate) * up, rounded to the dtype after the activation and after the product.
  void (*activate)(Dtype, Activation, void* gate, const void* up, int64_t n);
  // out = x with the channels below their thresholds set to 0.
  void (*drop)(Dtype, const void* x, const float* thresholds, void* out, int64_t n);
  // Lay out x (tokens, in) for `dots`: rows of padded(in) floats, as the instruction set wants them.
  void (*arrange)(Dtype, const float* wide, int tokens, int64_t in, float* arranged);
  // sums[t * stride + i] = sum over j of arranged[t, j] * weight[index[i] * row + j], i in
  // [begin, end); without an index, index[i] is i. tokens is 1, 2, 4 or 8.
  void (*dots)(Dtype, const void* weight, int64_t row, const int32_t* index, const float* arranged,
               int tokens, int64_t in, int64_t begin, int64_t end, float* sums, int64_t stride);
  // y[i] = sums[i] + bias[i] in the dtype, n values.
  void (*finish)(Dtype, const float* sums, const void* bias, void* y, int64_t n);
  // values = softmax(scale * values), n of them; scale > 0.
  void (*softmax)(float* values, int64_t n, float scale);
  // y[t, 0:columns] = sum over k < count of weights[t * stride + k] * value[index[k] * row + ...],
  // up to four t.
  void (*weigh)(Dtype, const void* value, int64_t row, const int32_t* index, int64_t count,
                const float* weights, int tokens, int64_t stride, void* y, int64_t columns);
  // out = weight * (x * rsqrt(mean(x^2) + epsilon)), rounded to the dtype before the weight and
  // after it: RMSNorm of one row of n values. wide is room for n floats.
  void (*norm)(Dtype, const void* x, const void* weight, float epsilon, float* wide, void* out,
               int64_t n);
  // out = x * cos + (-x[n/2:], x[:n/2]) * sin, each step rounded to the dtype: rotary embedding of
  // one head of n values; out may be x.
  void (*rotate)(Dtype, const void* x, const void* cos, const void* sin, void* out, int64_t n);
  // The place of the largest of n values, the first of equals, or of the first NaN.
  int64_t (*largest)(Dtype, const void* values, int64_t n);
  // y = residual + y in the dtype, n values.
  void (*add)(Dtype, void* y, const void* residual, int64_t n);
  // y[:, begin:end] = x (tokens, in; rows x_stride apart) W + b in 16 bits, for up to
  // product_tokens tokens; a row of x is followed by a 0 if `in` is odd. Null where the instruction
  // set has no such kernel. `sums` has room for tokens * panel_sums floats, `panel` for panel_bytes.
  void (*multiply)(Dtype, const Projection&, const void* x, int64_t x_stride, int64_t tokens,
                   int64_t begin, int64_t end, float* sums, void* panel);
  // Read n bytes and do nothing with them: the bandwidth probe.
  uint32_t (*stream)(const void* data, int64_t n);
};

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx512_bf16;
#endif

}  // namespace wina
