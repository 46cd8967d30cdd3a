// Attention of one new position over a static cache, with several query heads to a key head.
//
// A cluster of CLUSTER blocks shares the positions of one key head; each key and value is read
// once for all QUERIES query heads, and only where the mask is true. Softmax is computed as the
// positions come (Milakov and Gimelshein, arXiv 1805.02867); partial results meet in a fixed order.
//
// Compile-time: ELEMENT, SIZE (of a head), QUERIES, CLUSTER, UNROLL.
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int PARTS = SIZE / WIDTH;       // threads to a position
constexpr int SLOTS = THREADS / PARTS;    // positions side by side
constexpr int OUTPUTS = QUERIES * SIZE;
constexpr int SHARE = (OUTPUTS + CLUSTER - 1) / CLUSTER;
constexpr float NOTHING = -1e30f;

__device__ __forceinline__ void send(float* mine, int rank, float value) {
  if (CLUSTER > 1) write_to(mine, rank, value); else *mine = value;
}

struct Arguments {
  const element *query, *key, *value;
  const u8* mask;
  element* out;  // (batch, heads, size)
  long long query_batch, query_head, key_batch, key_head, key_position;
  long long value_batch, value_head, value_position, mask_batch;
  float scale;
  int heads, positions;  // key heads
};

extern "C" __global__ void __launch_bounds__(THREADS)
    wina_attention(const __grid_constant__ Arguments a) {
  __shared__ float tops[WARPS][QUERIES], weights[WARPS][QUERIES];
  // Of each block of the cluster: maxima, sums, and its part of the outputs that this one finishes.
  __shared__ float top[CLUSTER][QUERIES], weight[CLUSTER][QUERIES], part[CLUSTER][SHARE];
  extern __shared__ __align__(16) float meet[];  // [WARPS][OUTPUTS]

  const int thread = threadIdx.x, warp = thread / 32;
  const int rank = CLUSTER == 1 ? 0 : cluster_rank();
  const int head = blockIdx.x / CLUSTER % a.heads, row = blockIdx.x / CLUSTER / a.heads;
  const int slot = thread / PARTS, offset = thread % PARTS * WIDTH;
  let_next_start();
  if (CLUSTER > 1) cluster_arrive();
  wait_for_inputs();

  float query[QUERIES][WIDTH], sums[QUERIES][WIDTH], high[QUERIES], total[QUERIES];
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) {
    unpack(load_fresh(a.query + row * a.query_batch + (head * QUERIES + q) * a.query_head + offset),
           query[q]);
    high[q] = NOTHING;
    total[q] = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      query[q][i] *= a.scale * 1.44269504088896341f;  // exp2 below
      sums[q][i] = 0.0f;
    }
  }
  const element* keys = a.key + row * a.key_batch + head * a.key_head + offset;
  const element* values = a.value + row * a.value_batch + head * a.value_head + offset;
  const u8* mask = a.mask + row * a.mask_batch;

  constexpr int STEP = CLUSTER * SLOTS;
  u8 seen[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int position = rank * SLOTS + slot + u * STEP;
    seen[u] = position < a.positions ? mask[position] : 0;
  }
  for (int start = rank * SLOTS + slot; start - slot < a.positions; start += UNROLL * STEP) {
    u8 now[UNROLL], any = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      now[u] = seen[u];
      any |= now[u];
      const int position = start + (UNROLL + u) * STEP;
      seen[u] = position < a.positions ? mask[position] : 0;
    }
    // The first keys are fetched together with their mask, not after it.
    const bool first = start == rank * SLOTS + slot;
    if (!first && !__any_sync(0xffffffffu, any)) continue;
    Vector key[UNROLL], value[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const long long position = start + u * STEP;
      const bool wanted = first ? position < a.positions : now[u];
      key[u] = wanted ? load_fresh(keys + position * a.key_position) : Vector{{0, 0, 0, 0}};
      value[u] = wanted ? load_fresh(values + position * a.value_position) : Vector{{0, 0, 0, 0}};
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float k[WIDTH], v[WIDTH];
      unpack(key[u], k);
      unpack(value[u], v);
#pragma unroll
      for (int q = 0; q < QUERIES; ++q) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) score = fmaf(query[q][i], k[i], score);
#pragma unroll
        for (int step = PARTS / 2; step; step /= 2)
          score += __shfl_xor_sync(0xffffffffu, score, step);
        if (!now[u]) continue;
        const float higher = score > high[q] || score != score ? score : high[q];  // NaN is seen
        const float shrink = exp2f(high[q] - higher), share = exp2f(score - higher);
        high[q] = higher;
        total[q] = fmaf(total[q], shrink, share);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sums[q][i] = fmaf(sums[q][i], shrink, share * v[i]);
      }
    }
  }

  // The slots of a warp, then the warps, then the blocks of the cluster.
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) {
#pragma unroll
    for (int step = PARTS; step < 32; step *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, high[q], step);
      const float higher = other > high[q] || other != other ? other : high[q];
      const float shrink = exp2f(high[q] - higher);
      total[q] *= shrink;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        sums[q][i] *= shrink;
        sums[q][i] += __shfl_xor_sync(0xffffffffu, sums[q][i], step);
      }
      total[q] += __shfl_xor_sync(0xffffffffu, total[q], step);
      high[q] = higher;
    }
    if (thread % 32 < PARTS) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) meet[warp * OUTPUTS + q * SIZE + offset + i] = sums[q][i];
    }
    if (thread % 32 == 0) {
      tops[warp][q] = high[q];
      weights[warp][q] = total[q];
    }
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_wait();  // the others have started, long ago
  for (int i = thread; i < OUTPUTS; i += THREADS) {
    const int q = i / SIZE;
    float highest = NOTHING, sum = 0.0f, all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
      highest = tops[w][q] > highest || tops[w][q] != tops[w][q] ? tops[w][q] : highest;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float shrink = exp2f(tops[w][q] - highest);
      sum = fmaf(meet[w * OUTPUTS + i], shrink, sum);
      all = fmaf(weights[w][q], shrink, all);
    }
    send(&part[rank][i % SHARE], i / SHARE, sum);
    if (i % SIZE < CLUSTER) {  // to each block once
      send(&top[rank][q], i % SIZE, highest);
      send(&weight[rank][q], i % SIZE, all);
    }
  }
  if (CLUSTER > 1) cluster_arrive(), cluster_wait(); else __syncthreads();
  for (int i = rank * SHARE + thread; i < (rank + 1) * SHARE && i < OUTPUTS; i += THREADS) {
    const int q = i / SIZE;
    float highest = NOTHING, sum = 0.0f, all = 0.0f;
#pragma unroll
    for (int r = 0; r < CLUSTER; ++r) {
      const float found = top[r][q];
      highest = found > highest || found != found ? found : highest;
    }
#pragma unroll
    for (int r = 0; r < CLUSTER; ++r) {
      const float shrink = exp2f(top[r][q] - highest);
      sum = fmaf(part[r][i % SHARE], shrink, sum);
      all = fmaf(weight[r][q], shrink, all);
    }
    a.out[(static_cast<long long>(row) * a.heads + head) * OUTPUTS + i] = to_element(sum / all);
  }
}
