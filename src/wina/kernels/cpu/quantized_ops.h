// The operators on quantized weights; the layout is that of wina/kernels/quantized.py. Included by
// ops.cpp inside the namespace. A thread computes rows of x one after another.

static const QuantizedKernels& quantized_kernels() {
#if defined(__x86_64__)
  const bool vnni = __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(kernels->name, "avx512_bf16") == 0)
    return vnni ? quantized_avx512_vnni : quantized_avx512;
  if (std::strcmp(kernels->name, "avx512") == 0)  // where there is more, asked for by a test
    return vnni && !__builtin_cpu_supports("avx512bf16") ? quantized_avx512_vnni : quantized_avx512;
  if (std::strcmp(kernels->name, "avx2") == 0) return quantized_avx2;
#endif
  return quantized_portable;
}

// A list of weights is flat: codes, scales, zeros of each.
static QuantizedProjection quantized_projection(const std::vector<Tensor>& weights, size_t i,
                                                int64_t in) {
  check(weights.size() % 3 == 0 && 3 * i + 2 < weights.size(),
        "a quantized weight is three tensors: codes, scales, zeros");
  const Tensor &codes = weights[3 * i], &scales = weights[3 * i + 1], &zeros = weights[3 * i + 2];
  const bool bytes = codes.dtype() == torch.aoti_torch_dtype_int8();
  check(bytes || codes.dtype() == torch.aoti_torch_dtype_uint8(), "codes must be int8 or uint8");
  const bool by_block = codes.dim() == 3;
  check(by_block ? codes.is_contiguous() && codes.size(2) == code_block
                 : codes.dim() == 2 && (codes.size(1) < 2 || codes.stride(1) == 1),
        "codes must be contiguous blocks, or rows that are contiguous");
  check(scales.dim() == 2 && scales.is_contiguous() && zeros.is_contiguous(),
        "scales and zeros must be contiguous matrices");
  const int bits = bytes ? 8 : 4;
  const int64_t out = scales.size(1), groups = scales.size(0);
  const int64_t blocks = (out + block_outputs(bits) - 1) / block_outputs(bits);
  check(codes.size(by_block ? 1 : 0) == in,
        "a quantized weight must have a row of codes for each channel of x");
  check(by_block ? codes.size(0) == blocks : codes.size(1) == blocks * code_block,
        "a row of codes must be the blocks that the scales' outputs need");
  check(groups > 0 && in % groups == 0, "groups of channels must be of one size");
  const Dtype dtype = dtype_of(scales);
  check(dtype != Dtype::f64, "scales must be float32, float16 or bfloat16");
  Zeros kind = Zeros::none;
  if (zeros.dim() == 2) {
    check(zeros.size(0) == groups && zeros.size(1) == out, "zeros must have the scales' shape");
    const bool points = zeros.dtype() == torch.aoti_torch_dtype_int8();
    check(points || zeros.dtype() == scales.dtype(), "zeros must be int8 or of the scales' dtype");
    check(points || bits == 4, "codes of 8 bits have zero points, not minima");
    kind = points ? Zeros::points : Zeros::minima;
  }
  return {static_cast<const uint8_t*>(codes.data()), by_block ? code_block : codes.stride(0),
          by_block ? in * code_block : code_block, bits, scales.data(), dtype, zeros.data(), kind,
          in, out, groups};
}

// Weights of which a row is done so soon that threads which meet after each lose by it.
constexpr int64_t small_weights = int64_t(1) << 23;

static void check_bias(const Tensor& x, int64_t out, const Tensor* bias) {
  if (bias != nullptr)
    check(bias->dtype() == x.dtype() && bias->dim() == 1 && bias->size(0) == out &&
              (out < 2 || bias->stride(0) == 1),
          "bias must be a contiguous vector of x's dtype with one value for each output");
}

// The live channels of one row, as integers, for several projections of it.
class QuantizedLists {
 public:
  struct List {
    const Step* steps;
    int64_t count;
    const int32_t* rows;
    const int16_t* x;
    int64_t live;
  };

  void read(Dtype dtype, const void* x, const std::vector<QuantizedProjection>& projections,
            const std::vector<const float*>& thresholds) {
    const int64_t in = projections[0].in;
    Lists lists;
    lists.read(dtype, x, 1, in);
    lists.compact(thresholds);
    const int passes = dtype == Dtype::f32 ? 2 : 1;
    int64_t room = 0;
    for (size_t i = 0; i < projections.size(); ++i) room += passes * (2 * lists[i].count + 2);
    Step* steps = steps_memory().get<Step>(room);
    int32_t* rows = rows_memory().get<int32_t>(room);
    int16_t* values = values_memory().get<int16_t>(room);
    lists_.clear();
    for (size_t i = 0; i < projections.size(); ++i) {
      const Live& live = lists[i];
      const int64_t count =
          quantized_kernels().prepare(live.index, live.values, live.count,
                                      in / projections[i].groups, passes, rows, values, steps);
      lists_.push_back({steps, count, rows, values, live.count});
      const int64_t used = passes * (2 * live.count + 2);
      steps += used, rows += used, values += used;
    }
  }

  const List& operator[](size_t i) const { return lists_[i]; }

 private:
  static Scratch& steps_memory() {
    thread_local Scratch scratch;
    return scratch;
  }
  static Scratch& rows_memory() {
    thread_local Scratch scratch;
    return scratch;
  }
  static Scratch& values_memory() {
    thread_local Scratch scratch;
    return scratch;
  }
  std::vector<List> lists_;
};

// Outputs [first, last) of a projection to y, in x's dtype.
static void project_quantized(Dtype dtype, const QuantizedProjection& p,
                              const QuantizedLists::List& list, const Tensor* bias, void* y,
                              int64_t first, int64_t last) {
  thread_local Scratch scratch;
  float* sums = scratch.get<float>(last - first + quantized_split);
  quantized_kernels().project(p, list.steps, list.count, list.rows, list.x, first, last, sums);
  const int64_t width = bytes_of(dtype);
  const char* b = bias == nullptr ? nullptr : static_cast<const char*>(bias->data());
  kernels->finish(dtype, sums, b ? b + first * width : nullptr,
                  static_cast<char*>(y) + first * width, last - first);
}

// Outputs of shares [from, to) of `parts` of all projections, laid side by side and equal in products.
template <class Body>
static void quantized_share(const std::vector<QuantizedProjection>& projections,
                            const QuantizedLists& lists, int64_t from, int64_t to, int64_t parts,
                            const Body& body) {
  double total = 0, before = 0;
  for (size_t i = 0; i < projections.size(); ++i)
    total += double(lists[i].live + 1) * double(projections[i].out);
  const double begin = total * double(from) / double(parts);
  const double end = total * double(to) / double(parts);
  for (size_t i = 0; i < projections.size(); ++i) {
    const int64_t out = projections[i].out;
    const double weight = double(lists[i].live + 1);
    auto column = [&](double position) {
      const double column = std::min(std::max((position - before) / weight, 0.0), double(out));
      const int64_t near = (int64_t(column) + quantized_split / 2) / quantized_split;
      return std::min(out, near * quantized_split);
    };
    const int64_t first = from == 0 ? 0 : column(begin);
    const int64_t last = to == parts ? out : column(end);
    if (first < last) body(i, first, last);
    before += weight * double(out);
  }
}

static int64_t quantized_products(const std::vector<QuantizedProjection>& projections,
                                  const QuantizedLists& lists) {
  int64_t total = 0;
  for (size_t i = 0; i < projections.size(); ++i)
    total += (lists[i].live + 1) * projections[i].out;
  return total / 2;  // cheaper than those of the other kernels
}

static std::vector<Tensor> quantized_linears(Tensor x, const std::vector<Tensor>& weights,
                                             const std::vector<Tensor>& thresholds,
                                             const std::vector<Tensor>& biases) {
  check(x.dim() >= 1, "x must have at least one dimension");
  const size_t count = thresholds.size();
  check(weights.size() == 3 * count && (biases.empty() || biases.size() == count),
        "there must be as many thresholds, and biases if any, as weights");
  const int64_t in = x.size(-1), rows = rows_of(x);
  x = contiguous(std::move(x));
  const Dtype dtype = dtype_of(x);
  check(dtype != Dtype::f64, "float64 is not a dtype of this kernel");
  const int64_t width = bytes_of(dtype);
  std::vector<QuantizedProjection> projections;
  std::vector<const float*> vectors;
  std::vector<Tensor> results;
  for (size_t i = 0; i < count; ++i) {
    projections.push_back(quantized_projection(weights, i, in));
    check_bias(x, projections[i].out, bias_at(biases, i));
    vectors.push_back(thresholds_of(thresholds[i], in));
    results.push_back(Tensor::empty(result_sizes(x, projections[i].out), x.dtype()));
  }
  if (count == 0) return results;
  const auto read = [&](QuantizedLists& lists, int64_t row) {
    lists.read(dtype, static_cast<char*>(x.data()) + row * in * width, projections, vectors);
  };
  const auto project = [&](const QuantizedLists& lists, int64_t row, int64_t from, int64_t to,
                           int64_t parts) {
    quantized_share(projections, lists, from, to, parts, [&](size_t i, int64_t first, int64_t last) {
      char* y = static_cast<char*>(results[i].data()) + row * projections[i].out * width;
      project_quantized(dtype, projections[i], lists[i], bias_at(biases, i), y, first, last);
    });
  };
  int64_t all = 0;
  for (const QuantizedProjection& p : projections) all += in * p.out;
  if (rows == 1 || all > small_weights) {
    for (int64_t row = 0; row < rows; ++row) {
      QuantizedLists lists;
      read(lists, row);
      const int64_t parts = parts_for(quantized_products(projections, lists));
      parallel(parts, [&](int64_t part) { project(lists, row, part, part + 1, parts); });
    }
    return results;
  }
  // Threads meet once: of rows times parts shares, each takes a stretch of as many as there are rows.
  const int64_t parts = parts_for(rows * all / 4);
  parallel(parts, [&](int64_t part) {
    QuantizedLists lists;
    const int64_t begin = part * rows, end = begin + rows;
    for (int64_t row = begin / parts; row * parts < end; ++row) {
      read(lists, row);
      project(lists, row, std::max(begin - row * parts, int64_t(0)),
              std::min(end - row * parts, parts), parts);
    }
  });
  return results;
}

static Tensor quantized_gated_mlp(Tensor x, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& thresholds, Activation activation,
                                  const std::vector<Tensor>& biases) {
  check(x.dim() >= 1, "x must have at least one dimension");
  check(weights.size() == 9 && thresholds.size() == 3, "a gated MLP has three projections");
  check(biases.empty() || biases.size() == 3, "biases must be none or three");
  const int64_t in = x.size(-1), rows = rows_of(x);
  x = contiguous(std::move(x));
  const Dtype dtype = dtype_of(x);
  check(dtype != Dtype::f64, "float64 is not a dtype of this kernel");
  const int64_t width = bytes_of(dtype);
  const std::vector<QuantizedProjection> both{quantized_projection(weights, 0, in),
                                              quantized_projection(weights, 1, in)};
  const int64_t hidden = both[0].out;
  check(both[1].out == hidden, "gate and up must have one shape");
  const std::vector<QuantizedProjection> down{quantized_projection(weights, 2, hidden)};
  for (size_t i = 0; i < 3; ++i) check_bias(x, i < 2 ? hidden : down[0].out, bias_at(biases, i));
  const std::vector<const float*> vectors{thresholds_of(thresholds[0], in),
                                          thresholds_of(thresholds[1], in)};
  const std::vector<const float*> last_vector{thresholds_of(thresholds[2], hidden)};
  Tensor result = Tensor::empty(result_sizes(x, down[0].out), x.dtype());
  thread_local Scratch scratch;
  QuantizedLists lists;
  for (int64_t row = 0; row < rows; ++row) {
    lists.read(dtype, static_cast<char*>(x.data()) + row * in * width, both, vectors);
    char* a = scratch.get<char>(2 * hidden * width + 64);
    char* b = a + hidden * width;
    int64_t parts = parts_for(quantized_products(both, lists));
    parallel(parts, [&](int64_t part) {
      const int64_t units = (hidden + quantized_split - 1) / quantized_split;
      const int64_t first = std::min(hidden, units * part / parts * quantized_split);
      const int64_t last = std::min(hidden, units * (part + 1) / parts * quantized_split);
      if (first == last) return;
      project_quantized(dtype, both[0], lists[0], bias_at(biases, 0), a, first, last);
      project_quantized(dtype, both[1], lists[1], bias_at(biases, 1), b, first, last);
      kernels->activate(dtype, activation, a + first * width, b + first * width, last - first);
    });
    lists.read(dtype, a, down, last_vector);
    parts = parts_for(quantized_products(down, lists));
    char* y = static_cast<char*>(result.data()) + row * down[0].out * width;
    parallel(parts, [&](int64_t part) {
      quantized_share(down, lists, part, part + 1, parts, [&](size_t i, int64_t first, int64_t last) {
        project_quantized(dtype, down[i], lists[i], bias_at(biases, 2), y, first, last);
      });
    });
  }
  return result;
}

// Whether weights are quantized, three tensors each; their outputs; and what computes with either.
static bool is_quantized(const std::vector<Tensor>& weights, size_t count) {
  return weights.size() == 3 * count;
}
static int64_t outputs_of(const std::vector<Tensor>& weights, size_t count, size_t i) {
  return is_quantized(weights, count) ? weights[3 * i + 1].size(1) : weights[i].size(0);
}
static std::vector<Tensor> linears_of(Tensor x, const std::vector<Tensor>& weights,
                                      const std::vector<Tensor>& thresholds,
                                      const std::vector<Tensor>& biases) {
  if (is_quantized(weights, thresholds.size()))
    return quantized_linears(std::move(x), weights, thresholds, biases);
  return sparse_linears(std::move(x), weights, thresholds, biases);
}
static Tensor gated_mlp_of(Tensor x, const std::vector<Tensor>& weights,
                           const std::vector<Tensor>& thresholds, Activation activation,
                           const std::vector<Tensor>& biases) {
  if (is_quantized(weights, 3))
    return quantized_gated_mlp(std::move(x), weights, thresholds, activation, biases);
  return sparse_gated_mlp(std::move(x), weights, thresholds, activation, biases);
}

static std::vector<Tensor> take_each(Value* stack, int begin, int end);
static Tensor take_normed(Value x, Value norm, Value epsilon);

static void call_quantized_linear(Value* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]);
  std::vector<Tensor> weights = take_tensors(stack[1]), thresholds = take_each(stack, 2, 3);
  std::vector<Tensor> biases = take_tensors(stack[3]);
  stack[0] = quantized_linears(std::move(x), weights, thresholds, biases)[0].release();
}

static void call_quantized_linears(Value* stack, uint64_t, uint64_t) {
  std::vector<Tensor> weights = take_tensors(stack[3]), thresholds = take_tensors(stack[4]);
  std::vector<Tensor> biases = take_tensors(stack[5]), residual = take_tensors(stack[6]);
  Tensor x = take_normed(stack[0], stack[1], stack[2]);
  std::vector<Tensor> results = quantized_linears(std::move(x), weights, thresholds, biases);
  if (!residual.empty()) {
    check(!results.empty(), "a residual is added to the first of the projections");
    add_residual(results[0], contiguous(std::move(residual[0])));
  }
  stack[0] = give_tensors(std::move(results));
}

static void call_quantized_gated_mlp(Value* stack, uint64_t, uint64_t) {
  std::vector<Tensor> weights = take_tensors(stack[3]), thresholds = take_tensors(stack[4]);
  std::string activation = take_string(stack[5]);
  std::vector<Tensor> biases = take_tensors(stack[6]), residual = take_tensors(stack[7]);
  Tensor x = take_normed(stack[0], stack[1], stack[2]);
  Tensor result = quantized_gated_mlp(std::move(x), weights, thresholds,
                                      activation_named(activation), biases);
  if (!residual.empty()) add_residual(result, contiguous(std::move(residual[0])));
  stack[0] = result.release();
}

// Nonzero if torch refuses.
static int register_quantized(Handle library) {
  return torch.torch_library_impl(library, "quantized_linear", call_quantized_linear,
                                  abi_version) ||
         torch.torch_library_impl(library, "quantized_linears", call_quantized_linears,
                                  abi_version) ||
         torch.torch_library_impl(library, "quantized_gated_mlp", call_quantized_gated_mlp,
                                  abi_version);
}
