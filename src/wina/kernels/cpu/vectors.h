// The vector types of an instruction set. A kernels_*.cpp defines
//   WINA_ISA      the name of its table of kernels
//   WINA_SPACE    the namespace of its code
//   WINA_TARGET   the attribute that lets the compiler use its instructions
//   WINA_LANES    float32 values in a vector register
// then includes this file, defines widen_half, narrow_half and compact_lanes, and includes
// kernels_body.h.

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define WINA_INLINE static inline __attribute__((always_inline)) WINA_TARGET

namespace wina::WINA_SPACE {

constexpr int lanes = WINA_LANES;
constexpr int block = 2 * lanes;
constexpr int registers = WINA_LANES == 16 ? 32 : 16;
typedef float Floats __attribute__((vector_size(4 * WINA_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * WINA_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * WINA_LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * WINA_LANES)));

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };
struct Pair { Floats a, b; };

template <class V>
WINA_INLINE V read(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
WINA_INLINE void write(void* to, V value) { std::memcpy(to, &value, sizeof value); }

}  // namespace wina::WINA_SPACE
