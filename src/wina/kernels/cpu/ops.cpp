// The operators: checks, the choice of a path, and the split over torch's threads.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "quantized.h"
#include "torch_abi.h"

namespace wina {

Torch torch;
static const Kernels* kernels = &portable;

// --- settings, written by wina.kernels.cpu before the operators run ---

// Rows of x up to which skipping rows of W is the faster way, by dtype, in and out; (0, 0) is the
// default of a dtype, if set.
static std::map<std::tuple<int, int64_t, int64_t>, int64_t> crossover;
constexpr int64_t default_crossover = 32;
// Whether the blocked product is used: not where oneDNN has matrix units to use.
static bool own_product = true;
// Products below which one thread is faster than waking a second.
static int64_t serial_products = 65536;

// --- memory ---

// Memory of this thread that grows and is used again; 64-byte aligned.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      check(data_ != nullptr, "out of memory");
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

static float* sums_of_thread() {
  thread_local Scratch scratch;
  return scratch.get<float>(tile_sums + 128 * max_tokens);
}

// --- threads ---

// Run body(part) for every part in [0, parts), spread over torch's threads.
template <class Body>
static void parallel(int64_t parts, const Body& body) {
  if (parts == 1) return body(0);
  auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t part = begin; part < end; ++part) (*static_cast<const Body*>(context))(part);
  };
  call(torch.torch_parallel_for(0, parts, 1, run, const_cast<Body*>(&body)));
}

static int64_t parts_for(int64_t products) {
  if (products < serial_products) return 1;
  uint32_t threads = 1;
  call(torch.torch_get_num_threads(&threads));
  return std::max<int64_t>(1, threads);
}

// Columns [first, last) of part `part` of `parts`, in multiples of split_columns.
static std::pair<int64_t, int64_t> share(int64_t columns, int64_t part, int64_t parts) {
  int64_t units = (columns + split_columns - 1) / split_columns;
  return {std::min(columns, units * part / parts * split_columns),
          std::min(columns, units * (part + 1) / parts * split_columns)};
}

// --- arguments ---

static Dtype dtype_of(const Tensor& tensor) {
  if (tensor.dtype() == torch.aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  if (tensor.dtype() == torch.aoti_torch_dtype_float16()) return Dtype::f16;
  if (tensor.dtype() == torch.aoti_torch_dtype_float32()) return Dtype::f32;
  check(tensor.dtype() == torch.aoti_torch_dtype_float64(), "x must be a real floating tensor");
  return Dtype::f64;
}

static int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

static const float* thresholds_of(const Tensor& thresholds, int64_t in) {
  check(thresholds.dtype() == torch.aoti_torch_dtype_float32() && thresholds.dim() == 1 &&
            thresholds.size(0) == in && (in < 2 || thresholds.stride(0) == 1),
        "thresholds must be a contiguous float32 vector with one value for each input channel");
  return static_cast<const float*>(thresholds.data());
}

static void check_weight(const Tensor& x, int64_t in, const Tensor& weight, const Tensor* bias) {
  check(weight.dim() == 2 && weight.size(1) == in, "weight must have shape (out, in), in = x's");
  check(weight.dtype() == x.dtype(), "x and weight must have one dtype");
  if (bias != nullptr)
    check(bias->dtype() == x.dtype() && bias->dim() == 1 && bias->size(0) == weight.size(0) &&
              (weight.size(0) < 2 || bias->stride(0) == 1),
          "bias must be a contiguous vector of x's dtype with one value for each output");
}

static const Tensor* bias_at(const std::vector<Tensor>& biases, size_t i) {
  if (biases.empty() || (biases[i].dim() == 1 && biases[i].size(0) == 0)) return nullptr;
  return &biases[i];
}

static bool is_input_major(const Tensor& weight) {
  return weight.size(0) < 2 || weight.stride(0) == 1;
}

static bool multiplies(const Tensor& x, const Tensor& weight);

// Whether to skip rows of W, or of the `out` of its outputs that are one projection; else the dense
// kernel runs on the masked x.
static bool skips(const Tensor& x, const Tensor& weight, int64_t out) {
  if (dtype_of(x) == Dtype::f64 || !is_input_major(weight)) return false;
  int dtype = int(dtype_of(x));
  auto found = crossover.find({dtype, weight.size(1), out});
  if (found == crossover.end()) found = crossover.find({dtype, 0, 0});
  if (found != crossover.end()) return rows_of(x) <= found->second;
  return rows_of(x) <= (multiplies(x, weight) ? max_tokens : default_crossover);
}

static bool skips(const Tensor& x, const Tensor& weight) {
  return skips(x, weight, weight.size(0));
}

static Projection projection(const Tensor& weight, const Tensor* bias, void* y) {
  return {weight.data(), bias == nullptr ? nullptr : bias->data(), y,
          weight.size(1), weight.size(0), weight.stride(1), weight.size(0)};
}

static Tensor contiguous(Tensor x) {
  if (x.is_contiguous()) return x;
  Value stack[2] = {x.release(), 0};  // memory_format = contiguous
  call(torch.torch_call_dispatcher("aten::contiguous", "", stack, abi_version));
  return take_tensor(stack[0]);
}

static std::vector<int64_t> result_sizes(const Tensor& x, int64_t out) {
  std::vector<int64_t> sizes = x.sizes();
  sizes.back() = out;
  return sizes;
}

// --- the dense path ---

static bool torch_says(const char* op) {
  Value stack[1] = {0};
  return torch.torch_call_dispatcher(op, "", stack, abi_version) == 0 && (stack[0] & 1) != 0;
}

// Whether torch multiplies matrices of a dtype at a good speed: through oneDNN, if of 16 bits.
static bool torch_multiplies(Dtype dtype) {
  static const bool brain = torch_says("mkldnn::_is_mkldnn_bf16_supported");
  static const bool half = torch_says("mkldnn::_is_mkldnn_fp16_supported");
  return dtype == Dtype::bf16 ? brain : dtype == Dtype::f16 ? half : true;
}

// Rows at a time on a weight with contiguous rows, which is read once for them, in its order.
constexpr int64_t dense_tokens = 4;
static bool dots_pay(const Tensor& x, const Tensor& weight) {
  const int64_t rows = rows_of(x);
  return dtype_of(x) != Dtype::f64 && rows > 0 && weight.dim() == 2 && weight.size(1) > 0 &&
         (weight.stride(1) == 1 || weight.size(1) < 2) &&
         (rows <= dense_tokens || !torch_multiplies(dtype_of(x)));
}

static Tensor dense_rows(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  const Dtype dtype = dtype_of(x);
  const int64_t in = x.size(-1), out = weight.size(0), rows = rows_of(x), width = bytes_of(dtype);
  Tensor result = Tensor::empty(result_sizes(x, out), x.dtype());
  const char* b = bias == nullptr ? nullptr : static_cast<const char*>(bias->data());
  const int64_t parts = parts_for(in * out);
  thread_local Scratch scratch;
  float* wide = scratch.get<float>(dense_tokens * (in + padded(in) + out) + 64);
  float* arranged = wide + dense_tokens * in;
  float* sums = arranged + dense_tokens * padded(in);
  for (int64_t row = 0; row < rows; row += dense_tokens) {
    const int real = int(std::min(dense_tokens, rows - row)), tokens = real == 3 ? 4 : real;
    const char* from = static_cast<const char*>(x.data()) + row * in * width;
    char* to = static_cast<char*>(result.data()) + row * out * width;
    std::memset(wide, 0, size_t(tokens) * in * sizeof(float));
    kernels->widen(dtype, from, wide, real * in);
    kernels->arrange(dtype, wide, tokens, in, arranged);
    parallel(parts, [&](int64_t part) {
      auto [first, last] = share(out, part, parts);
      if (first == last) return;
      kernels->dots(dtype, weight.data(), weight.stride(0), nullptr, arranged, tokens, in, first,
                    last, sums, out);
      for (int t = 0; t < real; ++t)
        kernels->finish(dtype, sums + t * out + first, b ? b + first * width : nullptr,
                        to + (t * out + first) * width, last - first);
    });
  }
  return result;
}

// Whether wina's own blocked product beats torch's, which repacks an input-major weight each time.
static bool multiplies(const Tensor& x, const Tensor& weight) {
  const Dtype dtype = dtype_of(x);
  return own_product && kernels->multiply != nullptr &&
         (dtype == Dtype::bf16 || dtype == Dtype::f16) && rows_of(x) > 1 && weight.dim() == 2 &&
         is_input_major(weight) && weight.size(1) > 0;
}

static Tensor product(Tensor x, const Tensor& weight, const Tensor* bias) {
  const int64_t in = weight.size(1), out = weight.size(0), tokens = rows_of(x);
  x = contiguous(std::move(x));
  Tensor result = Tensor::empty(result_sizes(x, out), x.dtype());
  const uint16_t* from = static_cast<const uint16_t*>(x.data());
  thread_local Scratch even;
  const int64_t row = in + in % 2;
  if (in % 2) {
    uint16_t* copy = even.get<uint16_t>(tokens * row);
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(copy + t * row, from + t * in, size_t(in) * sizeof *from);
      copy[t * row + in] = 0;
    }
    from = copy;
  }
  constexpr int64_t most = product_tokens;
  const int64_t parts = parts_for(in * out * tokens);
  parallel(parts, [&](int64_t part) {
    auto [first, last] = share(out, part, parts);
    if (first == last) return;
    thread_local Scratch panel, sums;
    for (int64_t t = 0; t < tokens; t += most) {
      const int64_t some = std::min(most, tokens - t);
      Projection p = projection(weight, bias, static_cast<uint16_t*>(result.data()) + t * out);
      kernels->multiply(dtype_of(x), p, from + t * row, row, some, first, last,
                        sums.get<float>(some * panel_sums), panel.get<char>(panel_bytes));
    }
  });
  return result;
}

static Tensor linear(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  if (dots_pay(x, weight)) return dense_rows(x, weight, bias);
  if (multiplies(x, weight)) return product(take_tensor(x.share()), weight, bias);
  // An optional argument is a pointer to a value that the callee deletes, or null.
  Value optional = bias == nullptr ? 0 : reinterpret_cast<Value>(new Value(bias->share()));
  Value stack[3] = {x.share(), weight.share(), optional};
  call(torch.torch_call_dispatcher("aten::linear", "", stack, abi_version));
  return take_tensor(stack[0]);
}

static Tensor masked(const Tensor& x, const float* thresholds) {
  Tensor result = Tensor::empty(x.sizes(), x.dtype());
  int64_t in = x.size(-1), rows = rows_of(x), row = in * bytes_of(dtype_of(x));
  Dtype dtype = dtype_of(x);
  const char* from = static_cast<const char*>(x.data());
  char* to = static_cast<char*>(result.data());
  const int64_t parts = std::max<int64_t>(1, std::min(rows, parts_for(in * rows)));
  parallel(parts, [&](int64_t part) {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
      kernels->drop(dtype, from + r * row, thresholds, to + r * row, in);
  });
  return result;
}

// x as each of several projections sees it: shape (projections, rows, in).
static Tensor drop_each(Tensor x, const Tensor& thresholds) {
  check(x.dim() == 2, "x must have shape (rows, in)");
  const int64_t rows = x.size(0), in = x.size(1), count = thresholds.size(0);
  check(thresholds.dtype() == torch.aoti_torch_dtype_float32() && thresholds.dim() == 2 &&
            thresholds.size(1) == in && thresholds.is_contiguous(),
        "thresholds must be contiguous float32 of shape (projections, in)");
  x = contiguous(std::move(x));
  Tensor result = Tensor::empty({count, rows, in}, x.dtype());
  const Dtype dtype = dtype_of(x);
  const int64_t row = in * bytes_of(dtype);
  const float* vectors = static_cast<const float*>(thresholds.data());
  const char* from = static_cast<const char*>(x.data());
  char* to = static_cast<char*>(result.data());
  const int64_t parts = std::max<int64_t>(1, std::min(rows, parts_for(in * rows * count)));
  parallel(parts, [&](int64_t part) {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
      for (int64_t i = 0; i < count; ++i)
        kernels->drop(dtype, from + r * row, vectors + i * in, to + (i * rows + r) * row, in);
  });
  return result;
}

// --- the sparse path ---

// The live channels of up to max_tokens rows for several projections of one input.
class Lists {
 public:
  // Widen rows of x, shape (real, in).
  void read(Dtype dtype, const void* x, int real, int64_t in) {
    real_ = real, in_ = in;
    wide_ = wide_memory().get<float>(real * in + 1);
    kernels->widen(dtype, x, wide_, real * in);
  }

  // List the channels above each of the thresholds.
  void compact(const std::vector<const float*>& thresholds) {
    int tokens = real_ == 1 ? 1 : real_ == 2 ? 2 : real_ <= 4 ? 4 : 8;
    int64_t stride = (in_ + split_columns) / 16 * 16, count = int64_t(thresholds.size());
    int32_t* memory = list_memory().get<int32_t>(count * stride * (1 + tokens));
    live_.clear();
    for (int64_t i = 0; i < count; ++i) {
      int32_t* index = memory + i * stride * (1 + tokens);
      Live live{index, reinterpret_cast<float*>(index + stride), stride, 0, tokens};
      kernels->compact(wide_, real_, in_, thresholds[size_t(i)], &live);
      live_.push_back(live);
    }
  }

  const Live& operator[](size_t i) const { return live_[i]; }
  int real() const { return real_; }

 private:
  static Scratch& wide_memory() {
    thread_local Scratch scratch;
    return scratch;
  }
  static Scratch& list_memory() {
    thread_local Scratch scratch;
    return scratch;
  }
  int real_ = 0;
  int64_t in_ = 0;
  float* wide_ = nullptr;
  std::vector<Live> live_;
};

// Compute all outputs of all projections. The outputs, laid side by side, are split into one
// stretch for each thread, equal in products. An output is summed by one thread in the order of
// its list, so the result does not depend on the number of threads.
static void project_all(Dtype dtype, const std::vector<Projection>& projections,
                        const Lists& lists) {
  int64_t total = 0;
  for (size_t i = 0; i < projections.size(); ++i)
    total += (lists[i].count + 1) * projections[i].out;
  int64_t parts = parts_for(total);
  parallel(parts, [&](int64_t part) {
    float* sums = sums_of_thread();
    double begin = double(total) * part / parts, end = double(total) * (part + 1) / parts;
    double before = 0;
    for (size_t i = 0; i < projections.size(); ++i) {
      const Projection& p = projections[i];
      double weight = double(lists[i].count + 1);
      auto column = [&](double position) {
        double column = std::min(std::max((position - before) / weight, 0.0), double(p.out));
        return column == double(p.out) ? p.out : int64_t(column) / split_columns * split_columns;
      };
      int64_t first = column(begin), last = part + 1 == parts ? p.out : column(end);
      if (first < last) kernels->project(dtype, p, lists[i], lists.real(), first, last, sums);
      before += weight * double(p.out);
    }
  });
}

static std::vector<Tensor> sparse_linears(Tensor x, const std::vector<Tensor>& weights,
                                          const std::vector<Tensor>& thresholds,
                                          const std::vector<Tensor>& biases) {
  check(x.dim() >= 1, "x must have at least one dimension");
  check(thresholds.size() == weights.size() && (biases.empty() || biases.size() == weights.size()),
        "there must be as many thresholds, and biases if any, as weights");
  const int64_t in = x.size(-1), rows = rows_of(x);
  x = contiguous(std::move(x));
  std::vector<Tensor> results(weights.size());
  std::vector<size_t> sparse;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor* bias = bias_at(biases, i);
    check_weight(x, in, weights[i], bias);
    thresholds_of(thresholds[i], in);
    if (skips(x, weights[i])) {
      results[i] = Tensor::empty(result_sizes(x, weights[i].size(0)), x.dtype());
      sparse.push_back(i);
    } else {
      results[i] = linear(masked(x, thresholds_of(thresholds[i], in)), weights[i], bias);
    }
  }
  if (sparse.empty()) return results;
  const Dtype dtype = dtype_of(x);
  Lists lists;
  for (int64_t row = 0; row < rows; row += max_tokens) {
    int real = int(std::min<int64_t>(max_tokens, rows - row));
    lists.read(dtype, static_cast<char*>(x.data()) + row * in * bytes_of(dtype), real, in);
    std::vector<const float*> vectors;
    std::vector<Projection> projections;
    for (size_t i : sparse) {
      vectors.push_back(thresholds_of(thresholds[i], in));
      char* y = static_cast<char*>(results[i].data());
      y += row * weights[i].size(0) * bytes_of(dtype);
      projections.push_back(projection(weights[i], bias_at(biases, i), y));
    }
    lists.compact(vectors);
    project_all(dtype, projections, lists);
  }
  return results;
}

static Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  fail("unknown activation '" + name + "'");
}

// gate = act(gate) * up, both (rows, hidden), contiguous.
static void activate(const Tensor& gate, const Tensor& up, Activation activation) {
  Dtype dtype = dtype_of(gate);
  int64_t count = rows_of(gate) * gate.size(-1), parts = parts_for(count);
  parallel(parts, [&](int64_t part) {
    auto [first, last] = share(count, part, parts);
    int64_t offset = first * bytes_of(dtype);
    kernels->activate(dtype, activation, static_cast<char*>(gate.data()) + offset,
                      static_cast<char*>(up.data()) + offset, last - first);
  });
}

static Tensor sparse_gated_mlp(Tensor x, const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& thresholds, Activation activation,
                               const std::vector<Tensor>& biases) {
  check(x.dim() >= 1, "x must have at least one dimension");
  const Tensor &gate = weights[0], &up = weights[1], &down = weights[2];
  const int64_t in = x.size(-1), rows = rows_of(x);
  check_weight(x, in, gate, bias_at(biases, 0));
  check_weight(x, in, up, bias_at(biases, 1));
  const int64_t hidden = gate.size(0);
  check(up.size(0) == hidden, "gate and up must have one shape");
  check_weight(x, hidden, down, bias_at(biases, 2));
  const float* vectors[] = {thresholds_of(thresholds[0], in), thresholds_of(thresholds[1], in),
                            thresholds_of(thresholds[2], hidden)};
  x = contiguous(std::move(x));
  if (!skips(x, gate) || !skips(x, up) || !skips(x, down)) {
    Tensor a = contiguous(linear(masked(x, vectors[0]), gate, bias_at(biases, 0)));
    Tensor b = contiguous(linear(masked(x, vectors[1]), up, bias_at(biases, 1)));
    activate(a, b, activation);
    return linear(masked(a, vectors[2]), down, bias_at(biases, 2));
  }
  const Dtype dtype = dtype_of(x);
  const int64_t width = bytes_of(dtype);
  Tensor result = Tensor::empty(result_sizes(x, down.size(0)), x.dtype());
  thread_local Scratch scratch;
  Lists lists;
  for (int64_t row = 0; row < rows; row += max_tokens) {
    int real = int(std::min<int64_t>(max_tokens, rows - row));
    lists.read(dtype, static_cast<char*>(x.data()) + row * in * width, real, in);
    lists.compact({vectors[0], vectors[1]});
    char* a = scratch.get<char>(2 * real * hidden * width + 1);
    char* b = a + real * hidden * width;
    Projection to_a = projection(gate, bias_at(biases, 0), a);
    Projection to_b = projection(up, bias_at(biases, 1), b);
    int64_t parts = parts_for((lists[0].count + lists[1].count) * hidden);
    parallel(parts, [&](int64_t part) {
      float* sums = sums_of_thread();
      auto [first, last] = share(hidden, part, parts);
      if (first == last) return;
      kernels->project(dtype, to_a, lists[0], real, first, last, sums);
      kernels->project(dtype, to_b, lists[1], real, first, last, sums);
      for (int token = 0; token < real; ++token) {
        int64_t offset = (token * hidden + first) * width;
        kernels->activate(dtype, activation, a + offset, b + offset, last - first);
      }
    });
    lists.read(dtype, a, real, hidden);
    lists.compact({vectors[2]});
    char* y = static_cast<char*>(result.data()) + row * down.size(0) * width;
    project_all(dtype, {projection(down, bias_at(biases, 2), y)}, lists);
  }
  return result;
}

// RMSNorm of the rows of x, which is contiguous.
static Tensor normed(const Tensor& x, const Tensor& weight, double epsilon) {
  const Dtype dtype = dtype_of(x);
  const int64_t in = x.size(-1), rows = rows_of(x), row = in * bytes_of(dtype);
  check(dtype != Dtype::f64, "a fused norm is not computed in float64");
  check(weight.dtype() == x.dtype() && weight.dim() == 1 && weight.size(0) == in &&
            (in < 2 || weight.stride(0) == 1),
        "the norm's weight must be a contiguous vector of x's dtype, one value for each channel");
  Tensor result = Tensor::empty(x.sizes(), x.dtype());
  thread_local Scratch scratch;
  float* wide = scratch.get<float>(in + 1);
  for (int64_t r = 0; r < rows; ++r)
    kernels->norm(dtype, static_cast<const char*>(x.data()) + r * row, weight.data(),
                  float(epsilon), wide, static_cast<char*>(result.data()) + r * row, in);
  return result;
}

static void add_residual(const Tensor& y, const Tensor& residual) {
  check(dtype_of(y) != Dtype::f64, "a fused sum is not computed in float64");
  check(residual.dtype() == y.dtype() && residual.sizes() == y.sizes(),
        "the residual must have the result's shape and dtype");
  check(residual.is_contiguous(), "the residual must be contiguous");
  kernels->add(dtype_of(y), y.data(), residual.data(), rows_of(y) * y.size(-1));
}

// W x + b, by whichever kernel is the fastest for the layout and the number of rows.
static Tensor dense_linear(Tensor x, const Tensor& weight, const std::vector<Tensor>& biases) {
  check(x.dim() >= 1, "x must have at least one dimension");
  const int64_t in = x.size(-1);
  const Tensor* bias = bias_at(biases, 0);
  check_weight(x, in, weight, bias);
  x = contiguous(std::move(x));
  if (dots_pay(x, weight) || !skips(x, weight)) return linear(x, weight, bias);
  const std::vector<float> zeros(size_t(in), 0.0f);
  const Dtype dtype = dtype_of(x);
  const int64_t rows = rows_of(x), width = bytes_of(dtype);
  Tensor result = Tensor::empty(result_sizes(x, weight.size(0)), x.dtype());
  Lists lists;
  for (int64_t row = 0; row < rows; row += max_tokens) {
    int real = int(std::min<int64_t>(max_tokens, rows - row));
    lists.read(dtype, static_cast<char*>(x.data()) + row * in * width, real, in);
    lists.compact({zeros.data()});
    char* y = static_cast<char*>(result.data()) + row * weight.size(0) * width;
    project_all(dtype, {projection(weight, bias, y)}, lists);
  }
  return result;
}

// --- attention of one position ---

// The positions that a mask (batch or 1, 1, 1, positions) lets through, for each of its rows.
struct Seen {
  std::vector<int32_t> index;  // (rows, positions), the first count of each row
  std::vector<int64_t> count;
  int64_t positions = 0;

  void read(Tensor mask, int64_t batch) {
    check(mask.dim() == 4 && mask.dtype() == torch.aoti_torch_dtype_bool() && mask.size(1) == 1 &&
              mask.size(2) == 1 && (mask.size(0) == 1 || mask.size(0) == batch),
          "mask must be bool of shape (batch or 1, 1, 1, positions)");
    mask = contiguous(std::move(mask));
    const int64_t rows = mask.size(0);
    positions = mask.size(3);
    index.resize(size_t(rows * positions) + 16);
    count.assign(size_t(rows), 0);
    for (int64_t r = 0; r < rows; ++r) {
      const bool* seen = static_cast<const bool*>(mask.data()) + r * positions;
      int32_t* to = index.data() + r * positions;
      int64_t n = 0;
      for (int64_t p = 0; p < positions; ++p) to[n] = int32_t(p), n += seen[p];
      count[size_t(r)] = n;
    }
  }
};

static void check_cache(const Tensor& key, const Tensor& value) {
  check(key.dim() == 4 && value.dim() == 4, "key and value must have four dimensions");
  check(key.dtype() == value.dtype(), "one dtype is needed");
  check(value.size(0) == key.size(0) && value.size(1) == key.size(1) &&
            value.size(2) == key.size(2),
        "key and value must have one batch, number of heads and of positions");
  check((key.size(3) < 2 || key.stride(3) == 1) && (value.size(3) < 2 || value.stride(3) == 1),
        "the last dimension of key and value must be contiguous");
}

// result (batch, heads, out) = softmax(scale q k^T where seen) v for query (batch, heads, size),
// both contiguous; heads share keys and values.
static void attend(const void* query, int64_t heads, const Tensor& key, const Tensor& value,
                   Seen& seen, double scale, void* result) {
  const Dtype dtype = dtype_of(key);
  const int64_t shared = key.size(1), size = key.size(3), out = value.size(3);
  const int64_t positions = seen.positions;
  const int64_t width = bytes_of(dtype), group = heads / shared;
  auto at = [&](const Tensor& t, int64_t b, int64_t h) {
    return static_cast<char*>(t.data()) + (b * t.stride(0) + h * t.stride(1)) * width;
  };
  const int64_t units = key.size(0) * shared;
  const int64_t parts = std::min(units, parts_for(units * positions * size));
  parallel(std::max<int64_t>(parts, 1), [&](int64_t part) {
    if (parts == 0) return;
    thread_local Scratch scratch;
    constexpr int most = 4;  // heads at a time
    const int64_t stride = (positions + 31) / 16 * 16;
    float* wide = scratch.get<float>(most * (size + padded(size) + stride) + 64);
    float* arranged = wide + most * size;
    float* scores = arranged + most * padded(size);
    for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
      const int64_t b = unit / shared, h = unit % shared, row = seen.count.size() == 1 ? 0 : b;
      int32_t* index = seen.index.data() + row * positions;
      const int64_t count = seen.count[size_t(row)];
      for (int64_t g = 0; g < group; g += most) {
        const int real = int(std::min<int64_t>(most, group - g));
        const int tokens = real <= 2 ? real : 4;
        const int64_t head = b * heads + h * group + g;
        std::memset(wide, 0, size_t(most) * size * sizeof(float));
        kernels->widen(dtype, static_cast<const char*>(query) + head * size * width, wide,
                       real * size);
        kernels->arrange(dtype, wide, tokens, size, arranged);
        kernels->dots(dtype, at(key, b, h), key.stride(2), index, arranged, tokens, size, 0,
                      count, scores, stride);
        for (int t = 0; t < real; ++t) kernels->softmax(scores + t * stride, count, float(scale));
        kernels->weigh(dtype, at(value, b, h), value.stride(2), index, count, scores, real, stride,
                       static_cast<char*>(result) + head * out * width, out);
      }
    }
  });
}

static Tensor decode_attention(Tensor query, const Tensor& key, const Tensor& value, Tensor mask,
                               double scale) {
  check_cache(key, value);
  check(query.dim() == 4 && dtype_of(query) != Dtype::f64 && key.dtype() == query.dtype(),
        "query must have four dimensions, and the dtype of the keys, which is not float64");
  const int64_t batch = query.size(0), heads = query.size(1), size = query.size(3);
  check(query.size(2) == 1 && key.size(1) > 0 && heads % key.size(1) == 0 && key.size(3) == size &&
            key.size(0) == batch,
        "query must have shape (batch, heads, 1, size), heads a multiple of the keys'");
  thread_local Seen seen;
  seen.read(std::move(mask), batch);
  check(seen.positions == key.size(2), "mask must be bool of shape (batch or 1, 1, 1, positions)");
  query = contiguous(std::move(query));
  Tensor result = Tensor::empty({batch, heads, 1, value.size(3)}, query.dtype());
  attend(query.data(), heads, key, value, seen, scale, result.data());
  return result;
}

// --- a run of decoder blocks, each step of which is one call ---

#include "quantized_ops.h"

struct Block {
  std::vector<Tensor> norm, weights, thresholds, biases;              // of q, k, v
  std::vector<Tensor> cache;                                          // keys, values, length
  std::vector<Tensor> out_weight, out_thresholds, out_bias;           // of o
  std::vector<Tensor> mlp_norm, mlp_weights, mlp_thresholds, mlp_biases;  // of gate, up, down
  double epsilon, scale, mlp_epsilon;
  Activation activation;
};

static std::map<int64_t, std::vector<Block>> programs;

// y + residual, y being x W or the like.
static Tensor plus(Tensor y, const Tensor& residual) {
  y = contiguous(std::move(y));
  add_residual(y, residual);
  return y;
}

static Tensor run_block(const Block& block, const Tensor& x, const Tensor& cos, const Tensor& sin,
                        Seen& seen) {
  const Tensor &key = block.cache[0], &value = block.cache[1], &length = block.cache[2];
  const Dtype dtype = dtype_of(x);
  const int64_t batch = x.size(0), shared = key.size(1), size = key.size(3), width = bytes_of(dtype);
  const int64_t heads = outputs_of(block.weights, 3, 0) / size, out = value.size(3);
  int64_t& position = *static_cast<int64_t*>(length.data());
  check(key.size(0) == batch && seen.positions == key.size(2) && position >= 0 &&
            position < key.size(2),
        "the cache does not fit the batch, the mask or the position");
  std::vector<Tensor> qkv = linears_of(normed(x, block.norm[0], block.epsilon), block.weights,
                                       block.thresholds, block.biases);
  for (Tensor& one : qkv) one = contiguous(std::move(one));
  auto at = [&](const Tensor& t, int64_t b, int64_t h) {
    const int64_t offset = b * t.stride(0) + h * t.stride(1) + position * t.stride(2);
    return static_cast<char*>(t.data()) + offset * width;
  };
  auto head = [&](const Tensor& t, int64_t b, int64_t h, int64_t n) {
    return static_cast<char*>(t.data()) + (b * t.size(-1) + h * n) * width;
  };
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t row = (cos.size(0) == 1 ? 0 : b) * size * width;
    const char* c = static_cast<const char*>(cos.data()) + row;
    const char* s = static_cast<const char*>(sin.data()) + row;
    for (int64_t h = 0; h < heads; ++h) {
      char* q = head(qkv[0], b, h, size);
      kernels->rotate(dtype, q, c, s, q, size);
    }
    for (int64_t h = 0; h < shared; ++h) {
      kernels->rotate(dtype, head(qkv[1], b, h, size), c, s, at(key, b, h), size);
      std::memcpy(at(value, b, h), head(qkv[2], b, h, out), size_t(out * width));
    }
  }
  ++position;
  Tensor mixed = Tensor::empty({batch, 1, heads * out}, x.dtype());
  attend(qkv[0].data(), heads, key, value, seen, block.scale, mixed.data());
  Tensor y = plus(std::move(linears_of(std::move(mixed), block.out_weight,
                                       block.out_thresholds, block.out_bias)[0]),
                  x);
  return plus(gated_mlp_of(normed(y, block.mlp_norm[0], block.mlp_epsilon), block.mlp_weights,
                           block.mlp_thresholds, block.activation, block.mlp_biases),
              y);
}

static Tensor decode_blocks(Tensor x, Tensor cos, Tensor sin, Tensor mask, int64_t program) {
  auto found = programs.find(program);
  check(found != programs.end(), "there is no such run of blocks");
  check(x.dim() == 3 && x.size(1) == 1, "x must have shape (batch, 1, hidden)");
  x = contiguous(std::move(x));
  cos = contiguous(std::move(cos));
  sin = contiguous(std::move(sin));
  const int64_t batch = x.size(0), size = found->second.at(0).cache[0].size(3);
  for (const Tensor* t : {&cos, &sin})
    check(t->dtype() == x.dtype() && t->dim() == 3 && t->size(1) == 1 && t->size(2) == size &&
              (t->size(0) == 1 || t->size(0) == batch),
          "cos and sin must have shape (batch or 1, 1, size) and x's dtype");
  thread_local Seen seen;
  seen.read(std::move(mask), batch);
  for (const Block& block : found->second) x = run_block(block, x, cos, sin, seen);
  return x;
}

static void add_block(int64_t program, Block block) {
  const size_t biases = block.biases.size(), mlp_biases = block.mlp_biases.size();
  auto fit = [](const std::vector<Tensor>& weights, size_t count) {
    return weights.size() == count || is_quantized(weights, count);
  };
  check(block.norm.size() == 1 && fit(block.weights, 3) && block.thresholds.size() == 3 &&
            block.cache.size() == 3 && fit(block.out_weight, 1) &&
            block.out_thresholds.size() == 1 && block.mlp_norm.size() == 1 &&
            fit(block.mlp_weights, 3) && block.mlp_thresholds.size() == 3 &&
            (biases == 0 || biases == 3) && (mlp_biases == 0 || mlp_biases == 3),
        "a block has two norms, q, k, v, o, gate, up, down, keys, values and their length");
  const Tensor &key = block.cache[0], &value = block.cache[1];
  check_cache(key, value);
  const int64_t shared = key.size(1), size = key.size(3);
  check(shared > 0 && size > 0 && size % 2 == 0 && outputs_of(block.weights, 3, 0) % (shared * size) == 0 &&
            outputs_of(block.weights, 3, 1) == shared * size &&
            outputs_of(block.weights, 3, 2) == shared * value.size(3),
        "q, k and v must fit the heads of the cache");
  programs[program].push_back(std::move(block));
}

// --- as torch calls them: the arguments on a stack, replaced by the results ---

static std::vector<Tensor> take_each(Value* stack, int begin, int end) {
  std::vector<Tensor> tensors;
  for (int i = begin; i < end; ++i) tensors.push_back(take_tensor(stack[i]));
  return tensors;
}

static void call_linear(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]);
  std::vector<Tensor> weights = take_each(stack, 1, 2), thresholds = take_each(stack, 2, 3);
  std::vector<Tensor> biases = take_tensors(stack[3]);
  stack[0] = sparse_linears(std::move(x), weights, thresholds, biases)[0].release();
}

static void call_linears(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]);
  std::vector<Tensor> weights = take_tensors(stack[1]), thresholds = take_tensors(stack[2]);
  std::vector<Tensor> biases = take_tensors(stack[3]);
  stack[0] = give_tensors(sparse_linears(std::move(x), weights, thresholds, biases));
}

static void call_gated_mlp(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]);
  std::vector<Tensor> weights = take_each(stack, 1, 4), thresholds = take_each(stack, 4, 7);
  std::string activation = take_string(stack[7]);
  std::vector<Tensor> biases = take_tensors(stack[8]);
  check(biases.empty() || biases.size() == 3, "biases must be none or three");
  stack[0] = sparse_gated_mlp(std::move(x), weights, thresholds, activation_named(activation),
                              biases)
                 .release();
}

static double take_double(Value value) {
  double number;
  std::memcpy(&number, &value, sizeof number);
  return number;
}

// x, or its RMSNorm.
static Tensor take_normed(Value x, Value norm, Value epsilon) {
  Tensor input = take_tensor(x);
  std::vector<Tensor> weight = take_tensors(norm);
  if (weight.empty()) return input;
  check(input.dim() >= 1, "x must have at least one dimension");
  return normed(contiguous(std::move(input)), weight[0], take_double(epsilon));
}

static void call_fused_linears(Value* stack, uint64_t, uint64_t) {
  std::vector<Tensor> weights = take_tensors(stack[3]), thresholds = take_tensors(stack[4]);
  std::vector<Tensor> biases = take_tensors(stack[5]), residual = take_tensors(stack[6]);
  Tensor x = take_normed(stack[0], stack[1], stack[2]);
  std::vector<Tensor> results = sparse_linears(std::move(x), weights, thresholds, biases);
  if (!residual.empty()) {
    check(!results.empty(), "a residual is added to the first of the projections");
    results[0] = contiguous(std::move(results[0]));
    add_residual(results[0], contiguous(std::move(residual[0])));
  }
  stack[0] = give_tensors(std::move(results));
}

static void call_fused_gated_mlp(Value* stack, uint64_t, uint64_t) {
  std::vector<Tensor> weights = take_tensors(stack[3]), thresholds = take_tensors(stack[4]);
  std::string activation = take_string(stack[5]);
  std::vector<Tensor> biases = take_tensors(stack[6]), residual = take_tensors(stack[7]);
  check(weights.size() == 3 && thresholds.size() == 3, "a gated MLP has three projections");
  check(biases.empty() || biases.size() == 3, "biases must be none or three");
  Tensor x = take_normed(stack[0], stack[1], stack[2]);
  Tensor result = contiguous(
      sparse_gated_mlp(std::move(x), weights, thresholds, activation_named(activation), biases));
  if (!residual.empty()) add_residual(result, contiguous(std::move(residual[0])));
  stack[0] = result.release();
}

static void call_dense_linear(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), weight = take_tensor(stack[1]);
  std::vector<Tensor> biases = take_tensors(stack[2]);
  stack[0] = dense_linear(std::move(x), weight, biases).release();
}

static void call_drop_each(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), thresholds = take_tensor(stack[1]);
  stack[0] = drop_each(std::move(x), thresholds).release();
}

static void call_decode_attention(Value* stack, uint64_t, uint64_t) {
  Tensor query = take_tensor(stack[0]), key = take_tensor(stack[1]);
  Tensor value = take_tensor(stack[2]), mask = take_tensor(stack[3]);
  const double scale = take_double(stack[4]);
  stack[0] =
      decode_attention(std::move(query), key, value, std::move(mask), scale).release();
}

static void call_add_block(Value* stack, uint64_t, uint64_t) {
  Block block;
  block.norm = take_tensors(stack[1]);
  block.epsilon = take_double(stack[2]);
  block.weights = take_tensors(stack[3]), block.thresholds = take_tensors(stack[4]);
  block.biases = take_tensors(stack[5]), block.cache = take_tensors(stack[6]);
  block.scale = take_double(stack[7]);
  block.out_weight = take_tensors(stack[8]), block.out_thresholds = take_tensors(stack[9]);
  block.out_bias = take_tensors(stack[10]), block.mlp_norm = take_tensors(stack[11]);
  block.mlp_epsilon = take_double(stack[12]);
  block.mlp_weights = take_tensors(stack[13]), block.mlp_thresholds = take_tensors(stack[14]);
  block.activation = activation_named(take_string(stack[15]));
  block.mlp_biases = take_tensors(stack[16]);
  add_block(int64_t(stack[0]), std::move(block));
}

static void call_decode_blocks(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), cos = take_tensor(stack[1]), sin = take_tensor(stack[2]);
  Tensor mask = take_tensor(stack[3]);
  stack[0] = decode_blocks(std::move(x), std::move(cos), std::move(sin), std::move(mask),
                           int64_t(stack[4]))
                 .release();
}

static void call_most_likely(Value* stack, uint64_t, uint64_t) {
  Tensor logits = contiguous(take_tensor(stack[0]));
  check(logits.dim() == 2 && logits.size(1) > 0 && dtype_of(logits) != Dtype::f64,
        "logits must have shape (batch, vocabulary), of 16 or 32 bits");
  const int64_t rows = logits.size(0), n = logits.size(1);
  const Dtype dtype = dtype_of(logits);
  Tensor result = Tensor::empty({rows}, torch.aoti_torch_dtype_int64());
  for (int64_t r = 0; r < rows; ++r)
    static_cast<int64_t*>(result.data())[r] = kernels->largest(
        dtype, static_cast<const char*>(logits.data()) + r * n * bytes_of(dtype), n);
  stack[0] = result.release();
}


// --- a fused layer of an engine's batch, all of whose rows are sparse ---

// Set while a batch has such rows alone, and nothing else serves them better.
static bool serves_batch = false;

// The projections of a layer: W's outputs from `begins[i]` on are one, `sizes[i]` of them.
struct Layer {
  const Tensor &weight, &thresholds;
  const char* bias;  // of all, or null
  std::vector<int64_t> begins, sizes;

  Projection at(size_t i, char* y, int64_t width) const {
    const int64_t offset = begins[i] * width, all = weight.size(0);
    const char* from = static_cast<const char*>(weight.data()) + offset;
    return {from,     bias == nullptr ? nullptr : bias + offset, y + offset, weight.size(1),
            sizes[i], weight.stride(1),                          all};
  }
  const float* vector(size_t i) const {
    return static_cast<const float*>(thresholds.data()) + int64_t(i) * weight.size(1);
  }
};

// The blocked product of x (rows, in), masked for each projection of `dense`.
static void multiply_masked(const Tensor& x, const Layer& layer, const std::vector<size_t>& dense,
                            char* y) {
  const Dtype dtype = dtype_of(x);
  const int64_t in = x.size(1), rows = x.size(0), width = bytes_of(dtype), even = in + in % 2;
  const int64_t all = layer.weight.size(0), count = int64_t(dense.size());
  thread_local Scratch scratch;
  char* masked = scratch.get<char>(count * rows * even * width);
  const char* from = static_cast<const char*>(x.data());
  const int64_t shares = std::max<int64_t>(1, std::min(rows, parts_for(count * rows * in)));
  parallel(shares, [&](int64_t part) {
    for (int64_t r = rows * part / shares; r < rows * (part + 1) / shares; ++r)
      for (int64_t i = 0; i < count; ++i) {
        char* to = masked + (i * rows + r) * even * width;
        kernels->drop(dtype, from + r * in * width, layer.vector(dense[size_t(i)]), to, in);
        std::memset(to + in * width, 0, size_t((even - in) * width));
      }
  });
  const int64_t parts = parts_for(rows * in * all);
  parallel(parts, [&](int64_t part) {
    thread_local Scratch panel, sums;
    for (int64_t i = 0; i < count; ++i) {
      auto [first, last] = share(layer.sizes[dense[size_t(i)]], part, parts);
      for (int64_t t = 0; first < last && t < rows; t += product_tokens) {
        const int64_t some = std::min(product_tokens, rows - t);
        const Projection p = layer.at(dense[size_t(i)], y + t * all * width, width);
        kernels->multiply(dtype, p, masked + (i * rows + t) * even * width, even, some, first, last,
                          sums.get<float>(some * panel_sums), panel.get<char>(panel_bytes));
      }
    }
  });
}

// All projections side by side: (rows, outputs of all).
static Tensor batch_linear(Tensor x, const Layer& layer, const std::vector<size_t>& sparse,
                           const std::vector<size_t>& dense) {
  x = contiguous(std::move(x));
  const Dtype dtype = dtype_of(x);
  const int64_t in = x.size(1), rows = x.size(0), all = layer.weight.size(0);
  const int64_t width = bytes_of(dtype);
  Tensor result = Tensor::empty({rows, all}, x.dtype());
  char* y = static_cast<char*>(result.data());
  if (!dense.empty()) multiply_masked(x, layer, dense, y);
  if (sparse.empty()) return result;
  Lists lists;
  std::vector<const float*> vectors;
  for (size_t i : sparse) vectors.push_back(layer.vector(i));
  for (int64_t row = 0; row < rows; row += max_tokens) {
    const int real = int(std::min<int64_t>(max_tokens, rows - row));
    lists.read(dtype, static_cast<char*>(x.data()) + row * in * width, real, in);
    lists.compact(vectors);
    std::vector<Projection> projections;
    for (size_t i : sparse) projections.push_back(layer.at(i, y + row * all * width, width));
    project_all(dtype, projections, lists);
  }
  return result;
}

// Arguments as of wina::batch_linear (wina.integrations.vllm.ops), which serves any batch; this is
// for batches of sparse rows, where Python between the kernels takes as long as some of them.
static void call_batch_linear(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), weight = take_tensor(stack[1]);
  Tensor thresholds = take_tensor(stack[2]);
  const std::vector<int64_t> sizes = take_numbers(stack[3]);
  std::vector<Tensor> bias = take_tensors(stack[4]), extra = take_tensors(stack[5]);
  bool own = serves_batch && x.dim() == 2 && weight.dim() == 2 && is_input_major(weight) &&
             dtype_of(x) != Dtype::f64;
  Layer layer{weight, thresholds, nullptr, {}, sizes};
  std::vector<size_t> sparse, dense;
  int64_t outputs = 0;
  for (size_t i = 0; own && i < sizes.size(); ++i) {
    layer.begins.push_back(outputs);
    outputs += sizes[i];
    if (skips(x, weight, sizes[i])) sparse.push_back(i);
    else if (multiplies(x, weight)) dense.push_back(i);
    else own = false;
  }
  if (!own) {
    Value again[6] = {x.release(), weight.release(), thresholds.release(), give_numbers(sizes),
                      give_tensors(std::move(bias)), give_tensors(std::move(extra))};
    call(torch.torch_call_dispatcher("wina::divided_linear", "", again, abi_version));
    stack[0] = again[0];
    return;
  }
  const int64_t in = x.size(1), count = int64_t(sizes.size());
  check(thresholds.dtype() == torch.aoti_torch_dtype_float32() && thresholds.dim() == 2 &&
            thresholds.size(0) == count && thresholds.size(1) == in && thresholds.is_contiguous(),
        "thresholds must be contiguous float32 of shape (projections, in)");
  check(outputs == weight.size(0), "sizes must be those of the weight's projections");
  for (const auto* each : {&bias, &extra}) check_weight(x, in, weight, bias_at(*each, 0));
  thread_local Scratch sum;
  if (!bias.empty() || !extra.empty()) {
    const Tensor& first = bias.empty() ? extra[0] : bias[0];
    layer.bias = static_cast<const char*>(first.data());
    if (!bias.empty() && !extra.empty()) {
      char* both = sum.get<char>(outputs * bytes_of(dtype_of(x)) + 1);
      std::memcpy(both, layer.bias, size_t(outputs * bytes_of(dtype_of(x))));
      kernels->add(dtype_of(x), both, extra[0].data(), outputs);
      layer.bias = both;
    }
  }
  stack[0] = batch_linear(std::move(x), layer, sparse, dense).release();
}

static std::vector<const Kernels*> instruction_sets() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16);
    found.push_back(&avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
  found.push_back(&portable);
  return found;
}

static bool has_matrix_units() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
#else
  return false;
#endif
}

}  // namespace wina

#define WINA_EXPORT extern "C" __attribute__((visibility("default")))

// Register the operators' CPU implementations, with torch's functions as `find` gives them by
// name. Return null, or what went wrong.
WINA_EXPORT const char* wina_register(void* (*find)(const char*)) {
  using namespace wina;
#define WINA_FIND(name, ...)                                            \
  torch.name = reinterpret_cast<decltype(torch.name)>(find(#name));     \
  if (torch.name == nullptr) return "this torch lacks the function " #name;
  WINA_TORCH_CONSTANTS(WINA_FIND)
  WINA_TORCH_FUNCTIONS(WINA_FIND)
#undef WINA_FIND
  kernels = instruction_sets().front();
  own_product = !has_matrix_units();
  Handle library = nullptr;  // lives as long as the process
  if (torch.aoti_torch_library_init_impl("wina", "CPU", __FILE__, __LINE__, &library) ||
      torch.torch_library_impl(library, "sparse_linear", call_linear, abi_version) ||
      torch.torch_library_impl(library, "sparse_linears", call_linears, abi_version) ||
      torch.torch_library_impl(library, "sparse_gated_mlp", call_gated_mlp, abi_version) ||
      torch.torch_library_impl(library, "fused_linears", call_fused_linears, abi_version) ||
      torch.torch_library_impl(library, "fused_gated_mlp", call_fused_gated_mlp, abi_version) ||
      torch.torch_library_impl(library, "dense_linear", call_dense_linear, abi_version) ||
      torch.torch_library_impl(library, "drop_each", call_drop_each, abi_version) ||
      torch.torch_library_impl(library, "decode_attention", call_decode_attention, abi_version) ||
      torch.torch_library_impl(library, "add_block", call_add_block, abi_version) ||
      torch.torch_library_impl(library, "decode_blocks", call_decode_blocks, abi_version) ||
      torch.torch_library_impl(library, "most_likely", call_most_likely, abi_version) ||
      register_quantized(library))
    return "torch refused the operators";
  return nullptr;
}

// The name of the instruction set in use.
WINA_EXPORT const char* wina_instruction_set() { return wina::kernels->name; }

// Use an instruction set that this processor has; return 0 if it has none of that name.
WINA_EXPORT int wina_use_instruction_set(const char* name) {
  for (const wina::Kernels* candidate : wina::instruction_sets()) {
    if (std::strcmp(candidate->name, name) == 0) {
      wina::kernels = candidate;
      return 1;
    }
  }
  return 0;
}

WINA_EXPORT void wina_set_crossover(int dtype, int64_t in, int64_t out, int64_t rows) {
  wina::crossover[{dtype, in, out}] = rows;
}

WINA_EXPORT void wina_set_serial_products(int64_t products) { wina::serial_products = products; }

// Register wina::batch_linear, once it is defined; 0 is success. See call_batch_linear.
WINA_EXPORT int wina_register_batch_linear() {
  using namespace wina;
  Handle library = nullptr;  // lives as long as the process
  return torch.aoti_torch_library_init_impl("wina", "CPU", __FILE__, __LINE__, &library) ||
         torch.torch_library_impl(library, "batch_linear", call_batch_linear, abi_version);
}

WINA_EXPORT void wina_serve_batch(int serves) { wina::serves_batch = serves != 0; }

WINA_EXPORT void wina_free_blocks(int64_t program) { wina::programs.erase(program); }

// Read all of `data` with torch's threads, once; `seen` keeps the reads alive.
WINA_EXPORT uint32_t wina_stream(const void* data, int64_t bytes) {
  using namespace wina;
  int64_t parts = parts_for(bytes);
  std::vector<uint32_t> seen(size_t(parts) * 16);
  parallel(parts, [&](int64_t part) {
    int64_t begin = bytes / 64 * part / parts * 64, end = bytes / 64 * (part + 1) / parts * 64;
    seen[size_t(part) * 16] = kernels->stream(static_cast<const char*>(data) + begin, end - begin);
  });
  uint32_t all = 0;
  for (uint32_t one : seen) all ^= one;
  return all;
}
