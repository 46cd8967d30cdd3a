// The kernels themselves, written once with the compiler's vector types; see vectors.h.
//
// Columns are handled in blocks of two registers. The order of the columns inside the pair is the
// dtype's own: bfloat16 values are taken apart as even and odd columns, which needs no shuffle.

namespace wina::WINA_SPACE {

WINA_INLINE Pair load(const float* from) {
  return {read<Floats>(from), read<Floats>(from + lanes)};
}
WINA_INLINE Pair load(const Half* from) { return {widen_half(from), widen_half(from + lanes)}; }
WINA_INLINE Pair load(const Brain* from) {
  Words both = read<Words>(from);
  return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
}

// The bits of a bfloat16, rounded to nearest even, in the upper half of each word; NaN stays NaN.
WINA_INLINE Words round_brain(Floats value) {
  Words bits = (Words)value;
  Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  Words nan = (Words)(value != value);
  return (rounded & ~nan) | (nan & 0x7fc00000u);
}

WINA_INLINE void store(float* to, Pair value) {
  write(to, value.a);
  write(to + lanes, value.b);
}
WINA_INLINE void store(Half* to, Pair value) {
  narrow_half(to, value.a);
  narrow_half(to + lanes, value.b);
}
WINA_INLINE void store(Brain* to, Pair value) {
  write(to, (round_brain(value.a) >> 16) | (round_brain(value.b) & 0xffff0000u));
}

// The same for the first n columns of a block.
template <class S>
WINA_INLINE Pair load_part(const S* from, int64_t n) {
  S whole[block] = {};
  std::memcpy(whole, from, n * sizeof(S));
  return load(whole);
}
template <class S>
WINA_INLINE void store_part(S* to, Pair value, int64_t n) {
  S whole[block];
  store(whole, value);
  std::memcpy(to, whole, n * sizeof(S));
}

// Run f<S>(arguments) for the storage type of a dtype.
#define WINA_DISPATCH(dtype, f, ...)                        \
  do {                                                      \
    if ((dtype) == Dtype::f32) f<float>(__VA_ARGS__);       \
    else if ((dtype) == Dtype::f16) f<Half>(__VA_ARGS__);   \
    else f<Brain>(__VA_ARGS__);                             \
  } while (0)

// --- sums over live rows ---

// Between the sums of two tokens, so that they do not compete for one set of the cache.
constexpr int64_t sums_gap = 80;

// Columns are taken a line of the cache at a time where the registers hold the sums of that many,
// and tokens in groups whose sums they hold.
template <class S, int tokens>
struct Step {
  static constexpr int line = 64 / int(block * sizeof(S));
  static constexpr int room = registers / (4 * tokens);
  static constexpr int blocks = room < 1 || line < 1 ? 1 : room < line ? room : line;
  static constexpr int group = room < 1 ? registers / 4 : tokens;
};

// Add rows to the sums of `blocks` blocks of columns from c on; `columns` is read if the (one)
// block is incomplete. The same lines of the rows in `next` are fetched meanwhile.
template <class S, int tokens, int rows, int blocks, bool whole>
WINA_INLINE void add_blocks(const S* const* row, const S* const* next, const float* x,
                            int64_t x_stride, int64_t c, int64_t columns, float* sums,
                            int64_t sums_stride) {
  constexpr int group = Step<S, tokens>::group;
  const bool fetch = whole && (blocks * block * sizeof(S) >= 64 || c * sizeof(S) % 64 == 0);
#pragma GCC unroll 8
  for (int g = 0; g < tokens; g += group) {
    Pair a[group][blocks];
#pragma GCC unroll 8
    for (int t = 0; t < group; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < blocks; ++i) {
        const float* sum = sums + (g + t) * sums_stride + c + i * block;
        a[t][i] = {read<Floats>(sum), read<Floats>(sum + lanes)};
      }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      Pair w[blocks];
#pragma GCC unroll 4
      for (int i = 0; i < blocks; ++i)
        w[i] = whole ? load(row[r] + c + i * block) : load_part(row[r] + c, columns - c);
      if (g == 0 && fetch)
        for (int64_t byte = 0; byte < int64_t(blocks * block * sizeof(S)); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(next[r] + c) + byte, 0, 2);
#pragma GCC unroll 8
      for (int t = 0; t < group; ++t) {
        const float value = x[(g + t) * x_stride + r];
#pragma GCC unroll 4
        for (int i = 0; i < blocks; ++i) {
          a[t][i].a += value * w[i].a;
          a[t][i].b += value * w[i].b;
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < group; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < blocks; ++i) {
        float* sum = sums + (g + t) * sums_stride + c + i * block;
        write(sum, a[t][i].a);
        write(sum + lanes, a[t][i].b);
      }
  }
}

// Add `rows` live rows, from number k on, to the sums of `columns` outputs from `begin` on. Rows
// that follow are fetched meanwhile: a live row is short, and a hardware prefetcher needs some
// lines of it before it starts. `whole` is false for a last, incomplete block.
template <class S, int tokens, int rows, bool whole>
WINA_INLINE void add_rows(const Projection& p, const Live& live, int64_t k, int64_t begin,
                          int64_t columns, float* sums, int64_t sums_stride) {
  const S* weight = static_cast<const S*>(p.weight) + begin;
  constexpr int64_t ahead = tokens == 1 ? 2 * rows : rows;
  const S* row[rows];
  const S* next[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = weight + live.index[k + r] * p.row;
    int64_t after = k + r + ahead < live.count ? k + r + ahead : k + r;
    next[r] = weight + live.index[after] * p.row;
  }
  constexpr int blocks = whole ? Step<S, tokens>::blocks : 1;
  const float* x = live.values + k;
  int64_t c = 0;
  for (; c + blocks * block <= columns; c += blocks * block)
    add_blocks<S, tokens, rows, blocks, whole>(row, next, x, live.stride, c, columns, sums,
                                               sums_stride);
  for (; c < columns; c += block)
    add_blocks<S, tokens, rows, 1, whole>(row, next, x, live.stride, c, columns, sums,
                                          sums_stride);
}

template <class S, int tokens, bool whole>
WINA_INLINE void add_all(const Projection& p, const Live& live, int64_t begin, int64_t columns,
                         float* sums, int64_t sums_stride) {
  constexpr int rows = 8;
  int64_t k = 0;
  for (; k + rows <= live.count; k += rows)
    add_rows<S, tokens, rows, whole>(p, live, k, begin, columns, sums, sums_stride);
  for (; k < live.count; ++k)
    add_rows<S, tokens, 1, whole>(p, live, k, begin, columns, sums, sums_stride);
}

template <class S>
WINA_INLINE Pair add_bias(Pair sum, const S* bias, int64_t n) {
  if (bias == nullptr) return sum;
  Pair b = n == block ? load(bias) : load_part(bias, n);
  return {sum.a + b.a, sum.b + b.b};
}

template <class S, int tokens>
WINA_TARGET static void project_tile(const Projection& p, const Live& live, int real,
                                     int64_t begin, int64_t end, float* sums) {
  int64_t columns = end - begin, rest = columns % block, full = columns - rest;
  int64_t stride = full + (rest ? block : 0) + sums_gap;
  std::memset(sums, 0, tokens * stride * sizeof(float));
  add_all<S, tokens, true>(p, live, begin, full, sums, stride);
  if (rest) add_all<S, tokens, false>(p, live, begin + full, rest, sums + full, stride);
  const S* bias = static_cast<const S*>(p.bias);
  for (int t = 0; t < real; ++t) {
    S* y = static_cast<S*>(p.y) + t * p.y_row + begin;
    for (int64_t c = 0; c < columns; c += block) {
      const float* sum = sums + t * stride + c;
      int64_t n = columns - c < block ? columns - c : int64_t(block);
      Pair value = add_bias({read<Floats>(sum), read<Floats>(sum + lanes)},
                            bias ? bias + begin + c : nullptr, n);
      if (n == block) store(y + c, value);
      else store_part(y + c, value, n);
    }
  }
}

#ifdef WINA_DOT
#include "dot_avx512.h"
#endif

template <class S>
WINA_TARGET static void project_columns(const Projection& p, const Live& live, int real,
                                        int64_t begin, int64_t end, float* sums) {
  const int64_t tile = live.tokens == 1 ? tile_sums / 2 : tile_sums / live.tokens;
  for (int64_t c = begin; c < end; c += tile) {
    int64_t stop = c + tile < end ? c + tile : end;
#ifdef WINA_DOT
    if (std::is_same<S, Brain>::value && live.tokens == 1) {
      project_tile_dot<1>(p, live, real, c, stop, sums);
      continue;
    }
    if (std::is_same<S, Brain>::value && live.tokens == 8) {  // slower than the other for 2 and 4
      project_tile_dot<8>(p, live, real, c, stop, sums);
      continue;
    }
#endif
    switch (live.tokens) {
      case 1: project_tile<S, 1>(p, live, real, c, stop, sums); break;
      case 2: project_tile<S, 2>(p, live, real, c, stop, sums); break;
      case 4: project_tile<S, 4>(p, live, real, c, stop, sums); break;
      default: project_tile<S, 8>(p, live, real, c, stop, sums);
    }
  }
}

WINA_TARGET static void project(Dtype dtype, const Projection& p, const Live& live, int real,
                                int64_t begin, int64_t end, float* sums) {
  WINA_DISPATCH(dtype, project_columns, p, live, real, begin, end, sums);
}

// --- elementwise ---

WINA_INLINE Floats fill(float value) { return value - Floats{}; }
// value where the lanes of mask are all ones, else other
WINA_INLINE Floats choose(Ints mask, Floats value, Floats other) {
  return (Floats)(((Words)mask & (Words)value) | (~(Words)mask & (Words)other));
}

// e^x to about 2 units in the last place; 0 below -87.3, infinite from 88.4, NaN for NaN.
WINA_INLINE Floats exponential(Floats x) {
  Ints nan = x != x;
  Floats bounded = choose(x > 89.0f, fill(89.0f), choose(x < -88.0f, fill(-88.0f), x));
  Floats scaled = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  Ints n = (Ints)scaled - 0x4b400000;
  Floats whole = scaled - 12582912.0f;
  Floats r = bounded - whole * 0.693359375f;  // ln 2 in two parts
  r = r + whole * 2.12194440e-4f;
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;  // Taylor: |r| <= ln(2) / 2
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  Floats power = (Floats)((n + 127) << 23);
  return choose(nan, x, sum * choose(n < -126, Floats{}, power));
}

WINA_INLINE Floats apply(Activation act, Floats x) {
  switch (act) {
    case Activation::silu: return x / (1.0f + exponential(-x));
    case Activation::relu: return choose(x < 0.0f, Floats{}, x);
    case Activation::gelu_tanh: {  // x (1 + tanh u) / 2 = x sigmoid(2 u), without cancellation
      Floats u = 0.79788456f * (x + 0.044715f * x * x * x);
      return x / (1.0f + exponential(-2.0f * u));
    }
    default:
      for (int i = 0; i < lanes; ++i) x[i] *= 0.5f * (1.0f + std::erf(x[i] * 0.70710678f));
      return x;
  }
}

template <class S>
WINA_INLINE Pair rounded(Pair value) {
  if (std::is_same<S, float>::value) return value;
  S stored[block];
  store(stored, value);
  return load(stored);
}

template <class S>
WINA_TARGET static void activate_all(Activation act, void* gate, const void* up, int64_t n) {
  S* g = static_cast<S*>(gate);
  const S* u = static_cast<const S*>(up);
  for (int64_t i = 0; i < n; i += block) {
    int64_t part = n - i < block ? n - i : int64_t(block);
    Pair x = part == block ? load(g + i) : load_part(g + i, part);
    Pair y = part == block ? load(u + i) : load_part(u + i, part);
    x = rounded<S>({apply(act, x.a), apply(act, x.b)});
    x = {x.a * y.a, x.b * y.b};
    if (part == block) store(g + i, x);
    else store_part(g + i, x, part);
  }
}

static inline double apply_double(Activation act, double x) {
  switch (act) {
    case Activation::silu: return x / (1.0 + std::exp(-x));
    case Activation::relu: return x < 0.0 ? 0.0 : x;
    case Activation::gelu_tanh:
      return x / (1.0 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)));
    default: return x * (0.5 * (1.0 + std::erf(x * 0.70710678118654752)));
  }
}

WINA_TARGET static void activate(Dtype dtype, Activation act, void* gate, const void* up,
                                 int64_t n) {
  if (dtype == Dtype::f64) {
    double* g = static_cast<double*>(gate);
    for (int64_t i = 0; i < n; ++i)
      g[i] = apply_double(act, g[i]) * static_cast<const double*>(up)[i];
    return;
  }
  WINA_DISPATCH(dtype, activate_all, act, gate, up, n);
}

WINA_INLINE float widen_one(float value) { return value; }
WINA_INLINE float widen_one(double value) { return float(value); }
WINA_INLINE float widen_one(Brain value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  return read<float>(&bits);
}
WINA_INLINE float widen_one(Half value) {
  Half one[lanes] = {value};
  return widen_half(one)[0];
}

template <class S>
WINA_TARGET static void widen_all(const void* x, float* wide, int64_t n) {
  const S* from = static_cast<const S*>(x);
  int64_t i = 0;
  if (std::is_same<S, Half>::value)
    for (; i + lanes <= n; i += lanes)
      write(wide + i, widen_half(reinterpret_cast<const Half*>(from + i)));
  for (; i < n; ++i) wide[i] = widen_one(from[i]);
}

WINA_TARGET static void widen(Dtype dtype, const void* x, float* wide, int64_t n) {
  WINA_DISPATCH(dtype, widen_all, x, wide, n);
}

WINA_INLINE bool below(float x, float threshold) { return std::fabs(x) < threshold; }

// All ones in the lanes of values that stay.
WINA_INLINE Ints kept(Floats value, const float* thresholds) {
  Floats size = (Floats)((Words)value & 0x7fffffffu);
  return ~(size < read<Floats>(thresholds));
}
WINA_INLINE void drop_lanes(const float* from, const float* thresholds, float* to) {
  Words value = read<Words>(from);
  write(to, value & (Words)kept((Floats)value, thresholds));
}
WINA_INLINE void drop_lanes(const Half* from, const float* thresholds, Half* to) {
  Ints keep = kept(widen_half(from), thresholds);
  write(to, read<Shorts>(from) & __builtin_convertvector((Words)keep, Shorts));
}
WINA_INLINE void drop_lanes(const Brain* from, const float* thresholds, Brain* to) {
  Shorts bits = read<Shorts>(from);
  Ints keep = kept((Floats)(__builtin_convertvector(bits, Words) << 16), thresholds);
  write(to, bits & __builtin_convertvector((Words)keep, Shorts));
}
WINA_INLINE void drop_lanes(const double* from, const float* thresholds, double* to) {
  for (int i = 0; i < lanes; ++i) to[i] = below(widen_one(from[i]), thresholds[i]) ? 0.0 : from[i];
}

template <class S>
WINA_TARGET static void drop_all(const void* x, const float* thresholds, void* out, int64_t n) {
  const S* from = static_cast<const S*>(x);
  S* to = static_cast<S*>(out);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) drop_lanes(from + i, thresholds + i, to + i);
  for (; i < n; ++i) to[i] = below(widen_one(from[i]), thresholds[i]) ? S{} : from[i];
}

WINA_TARGET static void drop(Dtype dtype, const void* x, const float* thresholds, void* out,
                             int64_t n) {
  if (dtype == Dtype::f64) return drop_all<double>(x, thresholds, out, n);
  WINA_DISPATCH(dtype, drop_all, x, thresholds, out, n);
}

// Channels whose values are all 0 are not listed either: they add nothing.
WINA_TARGET static void compact(const float* wide, int real, int64_t in, const float* thresholds,
                                Live* live) {
  int64_t count = 0;
  int64_t j = compact_lanes(wide, real, in, thresholds, live, &count);
  for (; j < in; ++j) {
    bool keep = false;
    for (int t = 0; t < real; ++t) {
      float x = wide[t * in + j];
      float value = below(x, thresholds[j]) ? 0.0f : x;
      live->values[t * live->stride + count] = value;
      keep |= value != 0.0f;
    }
    live->index[count] = int32_t(j);
    count += keep;
  }
  live->count = count;
  for (int t = real; t < live->tokens; ++t)
    std::memset(live->values + t * live->stride, 0, count * sizeof(float));
}

// --- many tokens ---

#if WINA_LANES >= 8
#include "product.h"

WINA_TARGET static void multiply(Dtype dtype, const Projection& p, const void* x, int64_t x_stride,
                                 int64_t tokens, int64_t begin, int64_t end, float* sums,
                                 void* room) {
#ifdef WINA_DOT
  if (dtype == Dtype::bf16) return multiply_pairs(p, x, x_stride, tokens, begin, end, sums, room);
#endif
  if (dtype == Dtype::bf16) multiply_wide<Brain>(p, x, x_stride, tokens, begin, end, sums, room);
  else multiply_wide<Half>(p, x, x_stride, tokens, begin, end, sums, room);
}
#define WINA_MULTIPLY WINA_SPACE::multiply
#else
#define WINA_MULTIPLY nullptr
#endif

// --- dot products with whole rows ---

// bfloat16 pairs are even and odd columns; others the first and the second half of a block.
WINA_TARGET static void arrange(Dtype dtype, const float* wide, int tokens, int64_t in,
                                float* arranged) {
  const int64_t stride = padded(in);
  std::memset(arranged, 0, tokens * stride * sizeof(float));
  for (int t = 0; t < tokens; ++t) {
    const float* from = wide + t * in;
    float* to = arranged + t * stride;
#ifdef WINA_DOT
    if (dtype == Dtype::bf16) {
      arrange_brain(from, reinterpret_cast<Brain*>(to), in);
      continue;
    }
#endif
    if (dtype != Dtype::bf16) {
      std::memcpy(to, from, in * sizeof(float));
      continue;
    }
    for (int64_t j = 0; j < in; ++j)
      to[j / block * block + (j % 2) * lanes + j % block / 2] = from[j];
  }
}

// Every loop over rows and tokens is unrolled, or the sums would not stay in registers.
template <class S, int tokens, int rows>
WINA_INLINE void dot_rows(const S* const* row, const float* x, int64_t x_stride, int64_t in,
                          float* sums, int64_t stride) {
  Floats a[rows][tokens];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) a[r][t] = Floats{};
  for (int64_t c = 0; c < in; c += block) {
    const bool whole = c + block <= in;
    Pair w[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      w[r] = whole ? load(row[r] + c) : load_part(row[r] + c, in - c);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      Floats even = read<Floats>(x + t * x_stride + c);
      Floats odd = read<Floats>(x + t * x_stride + c + lanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        a[r][t] += w[r].a * even;
        a[r][t] += w[r].b * odd;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) sums[t * stride + r] = total(a[r][t]);
}

// One token: a single stream through the weights, which the hardware's prefetcher follows best.
template <class S>
WINA_INLINE float dot_row(const S* row, const float* x, int64_t in) {
  Floats a{}, b{}, d{}, e{};
  int64_t c = 0;
  for (; c + 2 * block <= in; c += 2 * block) {
    __builtin_prefetch(row + c + 4096 / sizeof(S), 0, 2);
    __builtin_prefetch(row + c + 4096 / sizeof(S) + block, 0, 2);
    Pair w = load(row + c), v = load(row + c + block);
    a += w.a * read<Floats>(x + c);
    b += w.b * read<Floats>(x + c + lanes);
    d += v.a * read<Floats>(x + c + block);
    e += v.b * read<Floats>(x + c + block + lanes);
  }
  for (; c < in; c += block) {
    Pair w = c + block <= in ? load(row + c) : load_part(row + c, in - c);
    a += w.a * read<Floats>(x + c);
    b += w.b * read<Floats>(x + c + lanes);
  }
  return total((a + b) + (d + e));
}

template <class S, int tokens>
WINA_TARGET static void dot_tokens(const void* weight, int64_t row, const int32_t* index,
                                   const float* x, int64_t in, int64_t begin, int64_t end,
                                   float* sums, int64_t stride) {
  if (tokens == 1 && in >= 256) {
    const S* all = static_cast<const S*>(weight);
    for (int64_t i = begin; i < end; ++i)
      sums[i] = dot_row<S>(all + (index ? index[i] : i) * row, x, in);
    return;
  }
  constexpr int rows = tokens <= 2 ? 4 : tokens == 4 ? 4 : 2;
  const S* from = static_cast<const S*>(weight);
  const S* at[rows];
  int64_t i = begin;
  for (; i + rows <= end; i += rows) {
    for (int r = 0; r < rows; ++r) at[r] = from + (index ? index[i + r] : i + r) * row;
    dot_rows<S, tokens, rows>(at, x, padded(in), in, sums + i, stride);
  }
  for (; i < end; ++i) {
    at[0] = from + (index ? index[i] : i) * row;
    dot_rows<S, tokens, 1>(at, x, padded(in), in, sums + i, stride);
  }
}

template <class S>
WINA_TARGET static void dots_of(const void* weight, int64_t row, const int32_t* index,
                                const float* x, int tokens, int64_t in, int64_t begin,
                                int64_t end, float* sums, int64_t stride) {
#ifdef WINA_DOT
  if (std::is_same<S, Brain>::value) {
    const Brain* from = static_cast<const Brain*>(weight);
    const Brain* arranged = reinterpret_cast<const Brain*>(x);
    switch (tokens) {
      case 1: return brain_dots<1>(from, row, index, arranged, in, begin, end, sums, stride);
      case 2: return brain_dots<2>(from, row, index, arranged, in, begin, end, sums, stride);
      case 4: return brain_dots<4>(from, row, index, arranged, in, begin, end, sums, stride);
      default: return brain_dots<8>(from, row, index, arranged, in, begin, end, sums, stride);
    }
  }
#endif
  switch (tokens) {
    case 1: return dot_tokens<S, 1>(weight, row, index, x, in, begin, end, sums, stride);
    case 2: return dot_tokens<S, 2>(weight, row, index, x, in, begin, end, sums, stride);
    case 4: return dot_tokens<S, 4>(weight, row, index, x, in, begin, end, sums, stride);
    default: return dot_tokens<S, 8>(weight, row, index, x, in, begin, end, sums, stride);
  }
}

WINA_TARGET static void dots(Dtype dtype, const void* weight, int64_t row, const int32_t* index,
                             const float* arranged, int tokens, int64_t in, int64_t begin,
                             int64_t end, float* sums, int64_t stride) {
  WINA_DISPATCH(dtype, dots_of, weight, row, index, arranged, tokens, in, begin, end, sums, stride);
}

WINA_INLINE void narrow(float* to, Floats value) { write(to, value); }
WINA_INLINE void narrow(Half* to, Floats value) { narrow_half(to, value); }
WINA_INLINE void narrow(Brain* to, Floats value) {
  write(to, __builtin_convertvector(round_brain(value) >> 16, Shorts));
}

template <class S>
WINA_TARGET static void finish_all(const float* sums, const void* bias, void* y, int64_t n) {
  const S* b = static_cast<const S*>(bias);
  S* to = static_cast<S*>(y);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Floats value = read<Floats>(sums + i);
    for (int k = 0; b != nullptr && k < lanes; ++k) value[k] += widen_one(b[i + k]);
    narrow(to + i, value);
  }
  if (i == n) return;
  float rest[lanes] = {};
  S last[lanes];
  for (int64_t k = i; k < n; ++k) rest[k - i] = sums[k] + (b ? widen_one(b[k]) : 0.0f);
  narrow(last, read<Floats>(rest));
  std::memcpy(to + i, last, (n - i) * sizeof(S));
}

WINA_TARGET static void finish(Dtype dtype, const float* sums, const void* bias, void* y,
                               int64_t n) {
  WINA_DISPATCH(dtype, finish_all, sums, bias, y, n);
}

WINA_TARGET static void softmax(float* values, int64_t n, float scale) {
  Floats most = fill(-INFINITY);
  Ints nan{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Floats value = read<Floats>(values + i);
    most = choose(value > most, value, most);
    nan |= value != value;
  }
  float largest = -INFINITY, sum = 0;
  bool broken = false;
  for (int k = 0; k < lanes; ++k) {
    largest = most[k] > largest ? most[k] : largest;
    broken |= nan[k] != 0;
  }
  for (; i < n; ++i) {
    largest = values[i] > largest ? values[i] : largest;
    broken |= values[i] != values[i];
  }
  if (broken) largest = NAN;
  Floats sums{};
  for (i = 0; i + lanes <= n; i += lanes) {
    Floats power = exponential((read<Floats>(values + i) - largest) * scale);
    write(values + i, power);
    sums += power;
  }
  if (i < n) {
    float part[lanes];
    for (int k = 0; k < lanes; ++k) part[k] = i + k < n ? (values[i + k] - largest) * scale : -INFINITY;
    Floats power = exponential(read<Floats>(part));
    write(part, power);
    std::memcpy(values + i, part, (n - i) * sizeof(float));
    sums += power;
  }
  sum = total(sums);
  for (i = 0; i < n; ++i) values[i] /= sum;
}

// y[t, 0:columns] = sum over k of weights[t, k] * row index[k]: the sums stay in registers.
template <class S, int tokens, int blocks>
WINA_INLINE void weigh_blocks(const S* from, int64_t row, const int32_t* index, int64_t count,
                              const float* weights, int64_t stride, Pair (&sums)[tokens][blocks]) {
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) sums[t][b] = {Floats{}, Floats{}};
  for (int64_t k = 0; k < count; ++k) {
    const S* at = from + index[k] * row;
    Pair w[blocks];
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) w[b] = load(at + b * block);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const float weight = weights[t * stride + k];
#pragma GCC unroll 4
      for (int b = 0; b < blocks; ++b) {
        sums[t][b].a += weight * w[b].a;
        sums[t][b].b += weight * w[b].b;
      }
    }
  }
}

template <class S, int tokens>
WINA_TARGET static void weigh_tokens(const void* value, int64_t row, const int32_t* index,
                                     int64_t count, const float* weights, int64_t stride,
                                     void* y, int64_t columns) {
  constexpr int blocks = 2;
  const S* from = static_cast<const S*>(value);
  S* to = static_cast<S*>(y);
  int64_t c = 0;
  for (; c + blocks * block <= columns; c += blocks * block) {
    Pair sums[tokens][blocks];
    weigh_blocks<S, tokens, blocks>(from + c, row, index, count, weights, stride, sums);
    for (int t = 0; t < tokens; ++t)
      for (int b = 0; b < blocks; ++b) store(to + t * columns + c + b * block, sums[t][b]);
  }
  for (; c < columns; c += block) {
    const int64_t n = columns - c < block ? columns - c : int64_t(block);
    for (int t = 0; t < tokens; ++t) {
      Pair sum{Floats{}, Floats{}};
      for (int64_t k = 0; k < count; ++k) {
        Pair w = load_part(from + index[k] * row + c, n);
        sum = {sum.a + weights[t * stride + k] * w.a, sum.b + weights[t * stride + k] * w.b};
      }
      store_part(to + t * columns + c, sum, n);
    }
  }
}

template <class S>
WINA_TARGET static void weigh_all(const void* value, int64_t row, const int32_t* index,
                                  int64_t count, const float* weights, int tokens, int64_t stride,
                                  void* y, int64_t columns) {
  switch (tokens) {
    case 1: return weigh_tokens<S, 1>(value, row, index, count, weights, stride, y, columns);
    case 2: return weigh_tokens<S, 2>(value, row, index, count, weights, stride, y, columns);
    case 3: return weigh_tokens<S, 3>(value, row, index, count, weights, stride, y, columns);
    default: return weigh_tokens<S, 4>(value, row, index, count, weights, stride, y, columns);
  }
}

WINA_TARGET static void weigh(Dtype dtype, const void* value, int64_t row, const int32_t* index,
                              int64_t count, const float* weights, int tokens, int64_t stride,
                              void* y, int64_t columns) {
  WINA_DISPATCH(dtype, weigh_all, value, row, index, count, weights, tokens, stride, y, columns);
}

template <class S>
WINA_TARGET static void norm_all(const void* x, const void* weight, float epsilon, float* wide,
                                 void* out, int64_t n) {
  widen_all<S>(x, wide, n);
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int k = 0; k < 4; ++k) {
      Floats value = read<Floats>(wide + i + k * lanes);
      sums[k] += value * value;
    }
  float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += wide[i] * wide[i];
  const float scale = 1.0f / std::sqrt(sum / float(n) + epsilon);
  const S* from = static_cast<const S*>(x);
  const S* w = static_cast<const S*>(weight);
  S* to = static_cast<S*>(out);
  for (i = 0; i < n; i += block) {
    const int64_t part = n - i < block ? n - i : int64_t(block);
    Pair value = part == block ? load(from + i) : load_part(from + i, part);
    Pair by = part == block ? load(w + i) : load_part(w + i, part);
    value = rounded<S>({value.a * scale, value.b * scale});
    value = {by.a * value.a, by.b * value.b};
    if (part == block) store(to + i, value);
    else store_part(to + i, value, part);
  }
}

WINA_TARGET static void norm(Dtype dtype, const void* x, const void* weight, float epsilon,
                             float* wide, void* out, int64_t n) {
  WINA_DISPATCH(dtype, norm_all, x, weight, epsilon, wide, out, n);
}

template <class S>
WINA_TARGET static void add_to(void* y, const void* residual, int64_t n) {
  S* to = static_cast<S*>(y);
  const S* from = static_cast<const S*>(residual);
  for (int64_t i = 0; i < n; i += block) {
    const int64_t part = n - i < block ? n - i : int64_t(block);
    Pair a = part == block ? load(to + i) : load_part(to + i, part);
    Pair b = part == block ? load(from + i) : load_part(from + i, part);
    a = {b.a + a.a, b.b + a.b};
    if (part == block) store(to + i, a);
    else store_part(to + i, a, part);
  }
}

WINA_TARGET static void add(Dtype dtype, void* y, const void* residual, int64_t n) {
  WINA_DISPATCH(dtype, add_to, y, residual, n);
}

template <class S>
WINA_INLINE Pair load_up_to(const S* from, int64_t n) {
  return n == block ? load(from) : load_part(from, n);
}

// one * cos + sign * other * sin of n columns
template <class S>
WINA_INLINE Pair turned(Pair one, Pair other, float sign, const S* cos, const S* sin, int64_t n) {
  Pair by = load_up_to(cos, n), with = load_up_to(sin, n);
  Pair left = rounded<S>({one.a * by.a, one.b * by.b});
  Pair right = rounded<S>({sign * other.a * with.a, sign * other.b * with.b});
  return {left.a + right.a, left.b + right.b};
}

template <class S>
WINA_TARGET static void rotate_all(const void* x, const void* cos, const void* sin, void* out,
                                   int64_t n) {
  const S *from = static_cast<const S*>(x), *c = static_cast<const S*>(cos);
  const S* s = static_cast<const S*>(sin);
  S* to = static_cast<S*>(out);
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; i += block) {
    const int64_t part = half - i < block ? half - i : int64_t(block), j = half + i;
    Pair a = load_up_to(from + i, part), b = load_up_to(from + j, part);
    Pair low = turned<S>(a, b, -1.0f, c + i, s + i, part);
    Pair high = turned<S>(b, a, 1.0f, c + j, s + j, part);
    if (part == block) store(to + i, low), store(to + j, high);
    else store_part(to + i, low, part), store_part(to + j, high, part);
  }
}

WINA_TARGET static void rotate(Dtype dtype, const void* x, const void* cos, const void* sin,
                               void* out, int64_t n) {
  WINA_DISPATCH(dtype, rotate_all, x, cos, sin, out, n);
}

template <class S>
WINA_TARGET static void largest_of(const void* values, int64_t n, int64_t* place) {
  const S* from = static_cast<const S*>(values);
  Floats most = fill(-INFINITY);
  Ints nan{};
  int64_t i = 0;
  for (; i + block <= n; i += block) {
    Pair value = load(from + i);
    most = choose(value.a > most, value.a, most);
    most = choose(value.b > most, value.b, most);
    nan |= (value.a != value.a) | (value.b != value.b);
  }
  float best = -INFINITY;
  bool broken = false;
  for (int k = 0; k < lanes; ++k) {
    best = most[k] > best ? most[k] : best;
    broken |= nan[k] != 0;
  }
  for (; i < n; ++i) {
    const float value = widen_one(from[i]);
    best = value > best ? value : best;
    broken |= value != value;
  }
  for (i = 0; i < n; ++i) {
    const float value = widen_one(from[i]);
    if (broken ? value != value : value == best) break;
  }
  *place = i;
}

WINA_TARGET static int64_t largest(Dtype dtype, const void* values, int64_t n) {
  int64_t place = 0;
  WINA_DISPATCH(dtype, largest_of, values, n, &place);
  return place;
}

WINA_TARGET static uint32_t stream(const void* data, int64_t n) {
  const char* from = static_cast<const char*>(data);
  constexpr int64_t step = 4 * sizeof(Words);
  Words a{}, b{}, c{}, d{};
  for (int64_t i = 0; i + step <= n; i += step) {
    a ^= read<Words>(from + i);
    b ^= read<Words>(from + i + sizeof(Words));
    c ^= read<Words>(from + i + 2 * sizeof(Words));
    d ^= read<Words>(from + i + 3 * sizeof(Words));
  }
  a ^= b ^ c ^ d;
  uint32_t all = 0;
  for (int i = 0; i < lanes; ++i) all ^= a[i];
  return all;
}

}  // namespace wina::WINA_SPACE

namespace wina {

#define WINA_TEXT_(name) #name
#define WINA_TEXT(name) WINA_TEXT_(name)
extern const Kernels WINA_ISA{WINA_TEXT(WINA_ISA),  WINA_SPACE::widen,    WINA_SPACE::compact,
                              WINA_SPACE::project, WINA_SPACE::activate, WINA_SPACE::drop,
                              WINA_SPACE::arrange, WINA_SPACE::dots,     WINA_SPACE::finish,
                              WINA_SPACE::softmax, WINA_SPACE::weigh,    WINA_SPACE::norm,
                              WINA_SPACE::rotate,  WINA_SPACE::largest,  WINA_SPACE::add,
                              WINA_MULTIPLY,       WINA_SPACE::stream};

}  // namespace wina
