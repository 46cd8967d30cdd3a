// The place of the largest of a row's logits, the first of equals; NaN is the largest of all.
//
// A cluster of CLUSTER blocks reads one row; the first of them finishes it.
//
// Compile-time: ELEMENT, CLUSTER.
#include "common.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;

struct Arguments {
  const element* logits;  // (rows, vocabulary)
  long long* out;         // (rows)
  int vocabulary;
};

struct Best {
  float value;
  u32 place;

  __device__ __forceinline__ void meet(float other, u32 where) {
    const bool nan = value != value, other_nan = other != other;
    const bool equal = nan ? other_nan : other == value;
    if (equal ? where < place : other_nan || other > value) {
      value = other;
      place = where;
    }
  }
  __device__ __forceinline__ void meet_lanes() {
#pragma unroll
    for (int step = 16; step; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, value, step);
      const u32 where = __shfl_xor_sync(0xffffffffu, place, step);
      meet(other, where);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    wina_likely(const __grid_constant__ Arguments a) {
  __shared__ float values[WARPS], places[WARPS];    // places: as bits
  __shared__ float tops[CLUSTER], sites[CLUSTER];  // of the cluster's blocks
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int rank = CLUSTER == 1 ? 0 : cluster_rank(), row = blockIdx.x / CLUSTER;
  let_next_start();
  if (CLUSTER > 1) cluster_arrive();
  wait_for_inputs();
  const element* logits = a.logits + static_cast<long long>(row) * a.vocabulary;
  Best best = {__uint_as_float(0xff800000u), 0xffffffffu};  // minus infinity, after all others
  constexpr int STEP = CLUSTER * THREADS * WIDTH;
  constexpr int UNROLL = 4;
  for (int start = (rank * THREADS + thread) * WIDTH; start < a.vocabulary; start += UNROLL * STEP) {
    Vector found[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (start + u * STEP < a.vocabulary) found[u] = load_fresh(logits + start + u * STEP);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (start + u * STEP >= a.vocabulary) continue;
      float now[WIDTH];
      unpack(found[u], now);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) best.meet(now[i], start + u * STEP + i);
    }
  }
  best.meet_lanes();
  if (lane == 0) {
    values[warp] = best.value;
    places[warp] = __uint_as_float(best.place);
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_wait();  // the others have started, long ago
  if (warp == 0) {
    best = {values[lane % WARPS], __float_as_uint(places[lane % WARPS])};
    best.meet_lanes();
    if (lane == 0) {
      if (CLUSTER > 1) {
        write_to(&tops[rank], 0, best.value);
        write_to(&sites[rank], 0, __uint_as_float(best.place));
      } else {
        tops[0] = best.value;
        sites[0] = __uint_as_float(best.place);
      }
    }
  }
  if (CLUSTER > 1) cluster_arrive(), cluster_wait(); else __syncthreads();
  if (rank > 0 || thread > 0) return;
#pragma unroll
  for (int r = 0; r < CLUSTER; ++r) best.meet(tops[r], __float_as_uint(sites[r]));
  a.out[row] = best.place;
}
