// Live channels as integers, and scales as floats: what all instruction sets share. Included by
// quantized_*.cpp after it defined WINA_QUANTIZED_SPACE and WINA_QUANTIZED_TARGET.
#include <cmath>
#include <cstring>

#include "quantized.h"

namespace wina::WINA_QUANTIZED_SPACE {

#define WINA_QUANTIZED_INLINE static inline __attribute__((always_inline)) WINA_QUANTIZED_TARGET

// x of up to most_rows channels, rounded to integers of `scale`; what is not finite becomes a scale
// of NaN, which every output shows. Return the largest magnitude; `rest` is what rounding lost.
WINA_QUANTIZED_INLINE float round_values(const float* values, int64_t n, int16_t* x, Step* step,
                                         float* rest) {
  float most = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = std::fabs(values[i]);
    most = magnitude > most ? magnitude : most;
    finite &= magnitude <= 3.4028235e38f;
  }
  // A subnormal step would lose bits, and its inverse might be infinite.
  step->scale = most > 5e-34f ? most * (1.0f / 32767) : 1.5e-38f;
  const float inverse = 1.0f / step->scale;
  int32_t sum = 0;
  if (!finite) {
    step->scale = NAN;
    std::memset(x, 0, size_t(n) * sizeof(int16_t));
    std::memset(rest, 0, size_t(n) * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) {
      float scaled = values[i] * inverse;
      scaled = scaled > 32767.0f ? 32767.0f : scaled < -32767.0f ? -32767.0f : scaled;
      const float shifted = scaled + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
      int32_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      const int32_t whole = bits - 0x4b400000;
      x[i] = int16_t(whole);
      sum += whole;
      rest[i] = values[i] - step->scale * float(whole);
    }
  }
  step->sum = sum;
  return finite ? most : 1.0f;
}

WINA_QUANTIZED_TARGET static int64_t prepare(const int32_t* index, const float* values,
                                             int64_t count, int64_t group, int passes,
                                             int32_t* rows, int16_t* x, Step* steps) {
  int64_t n = 0, place = 0;
  for (int64_t k = 0; k < count;) {
    const int32_t g = int32_t(index[k] / group);
    const int64_t limit = (int64_t(g) + 1) * group;
    int64_t stop = k + 1;
    while (stop < count && stop - k < most_rows && index[stop] < limit) ++stop;
    const int64_t real = stop - k, padded = real + (real & 1);
    float rest[most_rows], more[most_rows];
    for (int pass = 0; pass < passes; ++pass) {
      Step& step = steps[n++];
      step.first = place, step.rows = int32_t(padded), step.group = g;
      std::memcpy(rows + place, index + k, size_t(real) * sizeof(int32_t));
      const float most = round_values(pass == 0 ? values + k : rest, real, x + place, &step,
                                      pass == 0 ? rest : more);
      if (most == 0) {  // nothing is left
        --n;
        break;
      }
      if (real & 1) rows[place + real] = index[k + real - 1], x[place + real] = 0;
      place += padded;
    }
    k = stop;
  }
  return n;
}

WINA_QUANTIZED_INLINE float narrow_scale(const uint16_t* from, Dtype dtype) {
  uint32_t bits = *from, wide;
  if (dtype == Dtype::bf16) {
    wide = bits << 16;
  } else {  // float16, by a multiplication that also gives subnormals
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    std::memcpy(&wide, &value, sizeof wide);
    if ((bits & 0x7c00u) == 0x7c00u) wide |= 0x7f800000u;
    wide |= (bits & 0x8000u) << 16;
  }
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Scale (or minimum) number i.
WINA_QUANTIZED_INLINE float scale_at(const void* scales, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(scales)[i];
  return narrow_scale(static_cast<const uint16_t*>(scales) + i, dtype);
}

}  // namespace wina::WINA_QUANTIZED_SPACE
