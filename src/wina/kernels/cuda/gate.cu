// drop(x) under up to three vectors of thresholds, for a dense product to follow.
//
// Compile-time: ELEMENT.
#include "common.cuh"

struct Arguments {
  const element* x;  // (tokens, inputs)
  const float* thresholds[3];
  element* out[3];
  long long size;  // tokens * inputs
  int inputs, count;
};

extern "C" __global__ void __launch_bounds__(256) wina_gate(const __grid_constant__ Arguments a) {
  let_next_start();
  wait_for_inputs();
  const long long place = (static_cast<long long>(blockIdx.x) * 256 + threadIdx.x) * WIDTH;
  if (place >= a.size) return;
  const int channel = place % a.inputs;
  const Vector found = load_fresh(a.x + place);
  float x[WIDTH];
  unpack(found, x);
  for (int which = 0; which < a.count; ++which) {
    float kept[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      kept[i] = fabsf(x[i]) < __ldg(a.thresholds[which] + channel + i) ? 0.0f : x[i];
    *reinterpret_cast<Vector*>(a.out[which] + place) = pack(kept);
  }
}
