// Attention of one new position over a static cache, with several query heads to a key head.
//
// A cluster of CLUSTER blocks shares the positions of one key head; each key and value is read
// once for all QUERIES query heads, and only where the mask is true. Softmax is computed as the
// positions come (Milakov and Gimelshein, arXiv 1805.02867); partial results meet in a fixed order.
// ROTARY: query and the new position's key come as they were projected. That many of a head's
// numbers are rotated, the first half with the second, as Transformers rounds it; the new key and
// value are written to the cache at *length, and the positions after it are not looked at.
//
// Compile-time: ELEMENT, SIZE (of a head), QUERIES, CLUSTER, UNROLL, ROTARY (or 0).
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int PARTS = SIZE / WIDTH;       // threads to a position
constexpr int SLOTS = THREADS / PARTS;    // positions side by side
constexpr int STEP = CLUSTER * SLOTS;     // the same of all blocks
constexpr int OUTPUTS = QUERIES * SIZE;
constexpr int SHARE = (OUTPUTS + CLUSTER - 1) / CLUSTER;
constexpr float NOTHING = -1e30f;

__device__ __forceinline__ void send(float* mine, int rank, float value) {
  if (CLUSTER > 1) write_to(mine, rank, value); else *mine = value;
}

struct Arguments {
  const element* query;
  element *key, *value;  // the cache; written with ROTARY only
  const u8* mask;
  element* out;  // (batch, heads, size)
  const element *new_key, *new_value, *cos, *sin;
  const long long* length;
  long long query_batch, query_head, key_batch, key_head, key_position;
  long long value_batch, value_head, value_position, mask_batch;
  long long new_key_batch, new_key_head, new_value_batch, new_value_head, turn_batch;
  float scale;
  int heads, positions;  // key heads
};

// A thread's part of cos and sin.
struct Turn {
  Vector cos, sin;
};

// A thread's part of a head that was projected, rotated.
__device__ __forceinline__ void read_head(float (&x)[WIDTH], const element* head, int offset,
                                          const Turn& turn) {
  const Vector found = load_fresh(head + offset);
#if ROTARY
  if (offset < ROTARY) {
    const bool low = offset < ROTARY / 2;
    const Vector with = load_fresh(head + offset + (low ? ROTARY / 2 : -ROTARY / 2));
    float other[WIDTH], cos[WIDTH], sin[WIDTH];
    unpack(found, x);
    unpack(with, other);
    unpack(turn.cos, cos);
    unpack(turn.sin, sin);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      x[i] = rounded(rounded(x[i] * cos[i]) + rounded((low ? -other[i] : other[i]) * sin[i]));
    return;
  }
#endif
  unpack(found, x);
}

// The scores of one position, known to all threads that share it.
__device__ __forceinline__ void score_all(float (&scores)[QUERIES],
                                          const float (&query)[QUERIES][WIDTH], const Vector& key) {
  float k[WIDTH];
  unpack(key, k);
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) {
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) score = fmaf(query[q][i], k[i], score);
#pragma unroll
    for (int step = PARTS / 2; step; step /= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
    scores[q] = score;
  }
}

// What a thread has seen so far: for each query the highest score, and sums relative to it.
struct Seen {
  float high[QUERIES], total[QUERIES], sums[QUERIES][WIDTH];

  __device__ __forceinline__ void raise(int q, float score) {
    const float higher = score > high[q] || score != score ? score : high[q];  // NaN is seen
    const float shrink = exp2f(high[q] - higher);
    high[q] = higher;
    total[q] *= shrink;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sums[q][i] *= shrink;
  }
  __device__ __forceinline__ void add(int q, float score, const float (&value)[WIDTH]) {
    const float share = exp2f(score - high[q]);
    total[q] += share;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sums[q][i] = fmaf(share, value[i], sums[q][i]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, QUERIES <= 4 ? 2 : 1)
    wina_attention(const __grid_constant__ Arguments a) {
  __shared__ float tops[WARPS][QUERIES], weights[WARPS][QUERIES];
  // Of each block of the cluster: maxima, sums, and its part of the outputs that this one finishes.
  __shared__ float top[CLUSTER][QUERIES], weight[CLUSTER][QUERIES], part[CLUSTER][SHARE];
  extern __shared__ __align__(16) float meet[];  // [WARPS][OUTPUTS]

  const int thread = threadIdx.x, warp = thread / 32;
  const int rank = CLUSTER == 1 ? 0 : cluster_rank();
  const int head = blockIdx.x / CLUSTER % a.heads, row = blockIdx.x / CLUSTER / a.heads;
  const int slot = thread / PARTS, offset = thread % PARTS * WIDTH;
  const int begin = rank * SLOTS + slot;
  const bool asks = offset * sizeof(element) % 128 == 0;  // for a position's 128 bytes
  element* keys = a.key + row * a.key_batch + head * a.key_head + offset;
  element* values = a.value + row * a.value_batch + head * a.value_head + offset;
  const u8* mask = a.mask + row * a.mask_batch;
  let_next_start();
  if (CLUSTER > 1) cluster_arrive();
#if ROTARY
  // While the kernel before still runs, the first positions come as far as the second-level cache:
  // no value is taken from there before they are known to be written.
  const long long about = peek(a.length);
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const long long position = begin + u * STEP;
    if (asks && position < about && position < a.positions) {
      fetch(keys + position * a.key_position);
      fetch(values + position * a.value_position);
    }
  }
#endif
  wait_for_inputs();

  // Masks are read two rounds ahead, keys and values come nearer one round ahead.
  u8 next[UNROLL], later[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int position = begin + u * STEP, other = position + UNROLL * STEP;
    next[u] = position < a.positions ? load_flag(mask + position) : 0;
    later[u] = other < a.positions ? load_flag(mask + other) : 0;
  }
  int bound = a.positions;
  Turn turn;
#if ROTARY
  const long long length = load_count(a.length);
  if (offset < ROTARY) {
    turn.cos = load_fresh(a.cos + row * a.turn_batch + offset);
    turn.sin = load_fresh(a.sin + row * a.turn_batch + offset);
  }
#endif
  float query[QUERIES][WIDTH];
  Seen seen;
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) {
    const element* from = a.query + row * a.query_batch + (head * QUERIES + q) * a.query_head;
    read_head(query[q], from, offset, turn);
    seen.high[q] = NOTHING;
    seen.total[q] = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      query[q][i] *= a.scale * 1.44269504088896341f;  // exp2 below
      seen.sums[q][i] = 0.0f;
    }
  }
#if ROTARY
  // The new position sees itself, whatever the mask says.
  const bool fits = length >= 0 && length < a.positions;
  const bool first = begin == 0 && fits;
  {
    float key[WIDTH], value[WIDTH], scores[QUERIES];
    read_head(key, a.new_key + row * a.new_key_batch + head * a.new_key_head, offset, turn);
    const Vector fresh_key = pack(key);
    const Vector fresh_value =
        load_fresh(a.new_value + row * a.new_value_batch + head * a.new_value_head + offset);
    score_all(scores, query, fresh_key);
    unpack(fresh_value, value);
    if (first) {
      *reinterpret_cast<Vector*>(keys + length * a.key_position) = fresh_key;
      *reinterpret_cast<Vector*>(values + length * a.value_position) = fresh_value;
#pragma unroll
      for (int q = 0; q < QUERIES; ++q) {
        seen.raise(q, scores[q]);
        seen.add(q, scores[q], value);
      }
    }
  }
  if (fits) bound = static_cast<int>(length);
#endif

  for (int start = begin; start - begin + rank * SLOTS < bound; start += UNROLL * STEP) {
    u8 now[UNROLL], any = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int position = start + u * STEP, other = position + 2 * UNROLL * STEP;
      const long long soon = position + UNROLL * STEP;
      now[u] = position < bound ? next[u] : 0;
      any |= now[u];
      next[u] = later[u];
      later[u] = other < bound ? load_flag(mask + other) : 0;
      if (asks && next[u] && soon < bound) {
        fetch(keys + soon * a.key_position);
        fetch(values + soon * a.value_position);
      }
    }
    // The first keys are read together with their mask, not after it.
    const bool together = start == begin;
    if (!together && !__any_sync(0xffffffffu, any)) continue;
    Vector key[UNROLL], value[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const long long position = start + u * STEP;
      const bool wanted = together ? position < a.positions : now[u];
      key[u] = wanted ? load_fresh(keys + position * a.key_position) : Vector{{0, 0, 0, 0}};
      value[u] = wanted ? load_fresh(values + position * a.value_position) : Vector{{0, 0, 0, 0}};
    }
    float scores[UNROLL][QUERIES];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) score_all(scores[u], query, key[u]);
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
      float highest = NOTHING;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const float score = scores[u][q];
        if (now[u]) highest = score > highest || score != score ? score : highest;
      }
      seen.raise(q, highest);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float v[WIDTH];
      unpack(value[u], v);
#pragma unroll
      for (int q = 0; q < QUERIES; ++q)
        if (now[u]) seen.add(q, scores[u][q], v);
    }
  }

  // The slots of a warp, then the warps, then the blocks of the cluster.
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) {
#pragma unroll
    for (int step = PARTS; step < 32; step *= 2) {
      seen.raise(q, __shfl_xor_sync(0xffffffffu, seen.high[q], step));
      seen.total[q] += __shfl_xor_sync(0xffffffffu, seen.total[q], step);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        seen.sums[q][i] += __shfl_xor_sync(0xffffffffu, seen.sums[q][i], step);
    }
    if (thread % 32 < PARTS) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        meet[warp * OUTPUTS + q * SIZE + offset + i] = seen.sums[q][i];
    }
    if (thread % 32 == 0) {
      tops[warp][q] = seen.high[q];
      weights[warp][q] = seen.total[q];
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
