// Any 64-bit machine: vectors of four, which are SSE2 on x86-64 and NEON on ARM.
#define WINA_ISA portable
#define WINA_SPACE portable_kernels
#define WINA_TARGET
#define WINA_LANES 4
#include "vectors.h"

namespace wina::WINA_SPACE {

WINA_INLINE Floats widen_half(const Half* from) {
  Words half = {from[0].bits, from[1].bits, from[2].bits, from[3].bits};
  // Exponent and fraction in place, the exponent's bias corrected by a multiplication, which also
  // gives subnormals; an exponent of all ones stays all ones.
  Floats magnitude = (Floats)((half & 0x7fffu) << 13) * 0x1p112f;
  Words special = (Words)((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Floats)((Words)magnitude | special | ((half & 0x8000u) << 16));
}

WINA_INLINE uint16_t narrow_one(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 leaves its bits lowest
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

WINA_INLINE void narrow_half(Half* to, Floats value) {
  for (int i = 0; i < lanes; ++i) to[i].bits = narrow_one(value[i]);
}

WINA_INLINE float total(Floats value) { return (value[0] + value[1]) + (value[2] + value[3]); }

WINA_INLINE int64_t compact_lanes(const float*, int, int64_t, const float*, Live*, int64_t*) {
  return 0;
}

}  // namespace wina::WINA_SPACE

#include "kernels_body.h"
