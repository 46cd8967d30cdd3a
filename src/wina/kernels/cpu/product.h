// Many tokens: a blocked product with an input-major weight of 16 bits, computed in float32.
// Included by kernels_body.h.
//
// A panel of W is widened once into the second-level cache; a strip of it, two registers wide,
// stays in the first while all tokens are multiplied with it, some at a time so that their sums
// stay in registers.

constexpr int64_t wide_rows = 192, wide_columns = 256, wide_tokens = registers / 2 - 2 - registers / 16;
static_assert(wide_rows * (wide_columns + product_tokens) * int64_t(sizeof(float)) <= panel_bytes &&
                  wide_columns <= panel_sums,
              "a panel does not fit");

// Columns of a strip one after another, each row as `load` leaves it; missing columns are zeros.
template <class S>
WINA_INLINE void widen_panel(const S* weight, int64_t row, int64_t rows, int64_t columns,
                             float* panel) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t c = 0; c < columns; c += block) {
      const S* from = weight + k * row + c;
      const Pair w = columns - c >= block ? load(from) : load_part(from, columns - c);
      float* to = panel + c * wide_rows + k * block;
      write(to, w.a);
      write(to + lanes, w.b);
    }
}

// sums (tokens, block) += x (tokens, rows) times a strip.
template <int tokens>
WINA_INLINE void multiply_wide_strip(const float* x, const float* strip, int64_t rows, float* sums,
                                     int64_t stride, bool first) {
  Floats a[tokens], b[tokens];
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) {
    a[t] = first ? Floats{} : read<Floats>(sums + t * stride);
    b[t] = first ? Floats{} : read<Floats>(sums + t * stride + lanes);
  }
  for (int64_t k = 0; k < rows; ++k) {
    const Floats low = read<Floats>(strip + k * block), high = read<Floats>(strip + k * block + lanes);
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
      const float value = x[t * wide_rows + k];
      a[t] += value * low;
      b[t] += value * high;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) {
    write(sums + t * stride, a[t]);
    write(sums + t * stride + lanes, b[t]);
  }
}

template <class S>
WINA_TARGET static void multiply_wide(const Projection& p, const void* x, int64_t x_stride,
                                      int64_t tokens, int64_t begin, int64_t end, float* sums,
                                      void* room) {
  const S *from = static_cast<const S*>(x), *weight = static_cast<const S*>(p.weight);
  const S* bias = static_cast<const S*>(p.bias);
  float *panel = static_cast<float*>(room), *wide = panel + wide_rows * wide_columns;
  for (int64_t c = begin; c < end; c += wide_columns) {
    const int64_t columns = end - c < wide_columns ? end - c : wide_columns;
    for (int64_t k = 0; k < p.in; k += wide_rows) {
      const int64_t rows = p.in - k < wide_rows ? p.in - k : wide_rows;
      widen_panel(weight + k * p.row + c, p.row, rows, columns, panel);
      for (int64_t t = 0; t < tokens; ++t)
        widen_all<S>(from + t * x_stride + k, wide + t * wide_rows, rows);
      for (int64_t s = 0; s < columns; s += block) {
        const float* strip = panel + s * wide_rows;
        int64_t t = 0;
        for (; t + wide_tokens <= tokens; t += wide_tokens)
          multiply_wide_strip<wide_tokens>(wide + t * wide_rows, strip, rows,
                                           sums + t * wide_columns + s, wide_columns, k == 0);
        for (; t + 2 <= tokens; t += 2)
          multiply_wide_strip<2>(wide + t * wide_rows, strip, rows, sums + t * wide_columns + s,
                                 wide_columns, k == 0);
        if (t < tokens)
          multiply_wide_strip<1>(wide + t * wide_rows, strip, rows, sums + t * wide_columns + s,
                                 wide_columns, k == 0);
      }
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t s = 0; s < columns; s += block) {
        const int64_t n = columns - s < block ? columns - s : int64_t(block);
        const float* sum = sums + t * wide_columns + s;
        const Pair value = add_bias({read<Floats>(sum), read<Floats>(sum + lanes)},
                                    bias ? bias + c + s : nullptr, n);
        S* y = static_cast<S*>(p.y) + t * p.y_row + c + s;
        if (n == block) store(y, value);
        else store_part(y, value, n);
      }
  }
}
