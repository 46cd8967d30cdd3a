// y = W drop(x) for a few tokens: only the rows of live channels are read.
//
// W is stored input-major: row j holds channel j's weights for all outputs. SPLIT blocks compute one
// tile of COLUMNS outputs. Each of them takes every SPLIT-th chunk of WIDTH channels, gates them,
// lists the live ones in shared memory, and adds up their rows; the blocks' sums then meet, in a
// fixed order, so that the result does not vary between runs. They meet in shared memory where the
// blocks are a cluster (CLUSTER = SPLIT). Clusters leave some multiprocessors with less to do, so
// blocks may also be on their own (CLUSTER = 1): sums go to memory, and the block that comes last,
// by an integer ticket, adds them up.
// WHOLE: each block gates all channels and lists its share of the live ones, so that no block has
// more rows to read than the others.
//
// Compile-time: ELEMENT, TOKENS, LANES, GROUPS, UNROLL, LOADS, PREFETCH, SPLIT, CLUSTER, WHOLE, HELD,
// GATED, NORM, BLOCKS.
//   LANES threads read one row's tile, 16 bytes each; GROUPS rows are read side by side, and each
//   thread has UNROLL under way (LOADS: how). PREFETCH bytes around a load go to the L2 cache.
//   HELD chunks of channels are gated by a thread at once. BLOCKS should fit a multiprocessor.
//   The live channels of the first AHEAD threads are asked for before they are listed.
//   GATED: two projections, out = act(gate) * up. Otherwise up to three, one after the other.
#include "common.cuh"

constexpr int COLUMNS = LANES * WIDTH;
constexpr int THREADS = (LANES * GROUPS + 31) / 32 * 32;
constexpr int WARPS = THREADS / 32;
constexpr int LISTS = GATED ? 2 : 1;
constexpr int SHARE = (COLUMNS + CLUSTER - 1) / CLUSTER;  // columns that a block finishes
constexpr bool FAR = SPLIT > CLUSTER;                     // sums meet in memory

struct Projection {
  const element* weight;
  const float* thresholds;
  const element* bias;  // or null
  element* out;         // (tokens, outputs)
  long long stride;     // elements from row to row of the weight
  int outputs, tiles;
};

struct Arguments {
  Projection projections[3];
  const element* x;         // (tokens, inputs)
  const element* norm;      // RMSNorm's weight, or null
  const element* residual;  // (tokens, outputs), added to the first projection's output, or null
  const unsigned char* flags;  // (tokens,): 0 where a token's channels are all live; or null
  float* sums;   // FAR: (tiles, LISTS, TOKENS, SPLIT, COLUMNS)
  u32* tickets;  // FAR: (tiles,), 0 before and after a launch
  long long pitch;  // elements from token to token of the outputs; 0: of each projection its outputs
  float epsilon;
  int inputs, tokens, count, activation, capacity, slots;  // slots: their place in shared memory
};

__device__ __forceinline__ float activate(float x, int kind) {
  switch (kind) {
    case 0: return x / (1.0f + __expf(-x));
    case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default: return x != x ? x : fmaxf(x, 0.0f);
  }
}

// The sum over the block of each token's value, in a fixed order; all threads get it.
__device__ __forceinline__ void block_sum(float (&values)[TOKENS], float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int token = 0; token < TOKENS; ++token) {
#pragma unroll
    for (int step = 16; step; step /= 2)
      values[token] += __shfl_xor_sync(0xffffffffu, values[token], step);
    if (lane == 0) scratch[warp * TOKENS + token] = values[token];
  }
  __syncthreads();
#pragma unroll
  for (int token = 0; token < TOKENS; ++token) {
    float sum = lane < WARPS ? scratch[lane * TOKENS + token] : 0.0f;
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    values[token] = sum;
  }
}

struct alignas(TOKENS * sizeof(element) < 16 ? TOKENS * sizeof(element) : 16) Values {
  element of[TOKENS];
};

// What is added to an output, read long before its sum is known.
struct Added {
  element bias[LISTS], residual;
};

__device__ __forceinline__ void read_added(Added& added, const Arguments& a, int which, int token,
                                           int output) {
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
    const Projection& p = a.projections[GATED ? list : which];
    added.bias[list] = p.bias ? load_one(p.bias + output) : element(0);
  }
  added.residual = element(0);
  if (!GATED && a.residual && which == 0)
    added.residual =
        load_one(a.residual + static_cast<long long>(token) * a.projections[0].outputs + output);
}

// Asks for a tile's part of some rows of a chunk.
__device__ __forceinline__ void fetch_rows(const Projection& p, int tile, int chunk, u32 live) {
  const int column = tile * COLUMNS;
  const int width = p.outputs - column < COLUMNS ? p.outputs - column : COLUMNS;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i)
    if (live >> i & 1) {
      const element* row = p.weight + (static_cast<long long>(chunk) * WIDTH + i) * p.stride + column;
      for (int place = 0; place < width; place += 128 / sizeof(element)) fetch(row + place);
    }
}

struct Gate {
  float thresholds[LISTS][WIDTH];
  float norm[WIDTH];
};

__device__ __forceinline__ void read_gate(Gate& gate, const Arguments& a, int which, int chunk) {
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
    const float* from = a.projections[GATED ? list : which].thresholds + chunk * WIDTH;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      const Vector four = load_constant(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) gate.thresholds[list][i + j] = __uint_as_float(four.words[j]);
    }
  }
#if NORM
  unpack(load_constant(a.norm + chunk * WIDTH), gate.norm);
#endif
}

__device__ __forceinline__ void read_x(Vector (&x)[TOKENS], const Arguments& a, int channel) {
#pragma unroll
  for (int token = 0; token < TOKENS; ++token)
    if (token < a.tokens)
      x[token] = load_fresh(a.x + static_cast<long long>(token) * a.inputs + channel);
}

// RMSNorm of a chunk of x, rounded as Transformers does it.
__device__ __forceinline__ Vector normed(const Vector& found, const Gate& gate, float scale) {
  float x[WIDTH];
  unpack(found, x);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) x[i] = gate.norm[i] * rounded(x[i] * scale);
  return pack(x);
}

// A thread's rows under way. LOADS 0: UNROLL loads, then their sums. 1: a register is loaded anew
// as soon as it was used. 2: as 1, by asynchronous copies into the thread's own slots of shared
// memory, which hold more than registers can.
struct Walk {
  const char* weights[LISTS];
  u32 strides[LISTS];
  const u32* rows;
  const Values* values;
  int ends[LISTS];  // of each list, in steps of the whole walk
  int gap;          // from the end of the first list to the second's place
  u64 policy;
  Vector* slots;
  Vector found[UNROLL];

  __device__ __forceinline__ int place(int step) const {
    return LISTS == 2 && step >= ends[0] ? step + gap : step;
  }
  __device__ __forceinline__ void start(int u, int step) {
    // Both are read, then one is chosen: an array indexed at run time would lie in memory.
    const u64 row = rows[place(step)];
    const char* from = weights[0] + row * strides[0];
    const char* other = weights[LISTS - 1] + row * strides[LISTS - 1];
    if (LISTS == 2 && step >= ends[0]) from = other;
    if (LOADS == 2) copy_stream(slots + u * THREADS, from, policy);
    else found[u] = load_stream(from, policy);
  }
  __device__ __forceinline__ void use(float (&sums)[TOKENS][WIDTH], int u, int step) const {
    float row[WIDTH];
    unpack(LOADS == 2 ? slots[u * THREADS] : found[u], row);
    const Values x = values[place(step)];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      const float value = to_float(x.of[token]);
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) sums[token][c] = fmaf(value, row[c], sums[token][c]);
    }
  }
};

__device__ __forceinline__ void add_rows(Walk& walk, float (&sums)[LISTS][TOKENS][WIDTH],
                                         int first) {
  constexpr int STEP = UNROLL * GROUPS, LAST = STEP - GROUPS;
  const int all = walk.ends[LISTS - 1];
  int i = first;
#if LOADS == 0
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
    for (; i + LAST < walk.ends[list]; i += STEP) {
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) walk.start(u, i + u * GROUPS);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) walk.use(sums[list], u, i + u * GROUPS);
    }
    // What is left of this list, beside the first of the next.
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * GROUPS < all) walk.start(u, i + u * GROUPS);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int step = i + u * GROUPS;
      if (step < walk.ends[list]) walk.use(sums[list], u, step);
      else if (step < all) walk.use(sums[LISTS - 1], u, step);
    }
    i += STEP;
  }
#else
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (i + u * GROUPS < all) walk.start(u, i + u * GROUPS);
    if (LOADS == 2) end_of_copies();
  }
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
    for (; i + LAST < walk.ends[list]; i += STEP) {
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int step = i + u * GROUPS;
        if (LOADS == 2) wait_for_copies<UNROLL - 1>();
        walk.use(sums[list], u, step);
        if (step + STEP < all) walk.start(u, step + STEP);
        if (LOADS == 2) end_of_copies();
      }
    }
    // What is left of this list, beside the first of the next.
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int step = i + u * GROUPS;
      if (LOADS == 2) wait_for_copies<UNROLL - 1>();
      if (step < walk.ends[list]) walk.use(sums[list], u, step);
      else if (step < all) walk.use(sums[LISTS - 1], u, step);
      if (step + STEP < all) walk.start(u, step + STEP);
      if (LOADS == 2) end_of_copies();
    }
    i += STEP;
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wina_rows(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) char memory[];
  __shared__ u32 totals[WARPS];
  __shared__ float scratch[WARPS * TOKENS];
  __shared__ float parts[CLUSTER][LISTS][TOKENS][SHARE];  // the blocks' sums of this one's share
  u32* rows = reinterpret_cast<u32*>(memory);  // [LISTS][capacity]
  Values* values = reinterpret_cast<Values*>(rows + LISTS * a.capacity);  // [LISTS][capacity]
  float* meet = reinterpret_cast<float*>(memory);  // [GROUPS][COLUMNS], when the lists are done

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  __shared__ bool last;  // FAR: of the tile's blocks
  const int rank = SPLIT == 1 ? 0 : FAR ? blockIdx.x % SPLIT : cluster_rank();
  int tile = blockIdx.x / SPLIT, which = 0;
  if (!GATED) {
    while (tile >= a.projections[which].tiles) tile -= a.projections[which++].tiles;
  }
  const int chunks = a.inputs / WIDTH;
  // Chunks of this block: every EVERY-th from the first.
  constexpr int EVERY = WHOLE ? 1 : SPLIT;
  const int least = WHOLE ? 0 : rank;
  const int mine = (chunks - least + EVERY - 1) / EVERY;

  let_next_start();
  if (CLUSTER > 1) cluster_arrive();
  Gate gate[HELD];
#pragma unroll
  for (int held = 0; held < HELD; ++held) {
    const int chunk = thread + THREADS * held;
    if (chunk < mine) read_gate(gate[held], a, which, least + EVERY * chunk);
  }
  const u64 policy = stream_policy();
  wait_for_inputs();

  Vector x[HELD][TOKENS];
#pragma unroll
  for (int held = 0; held < HELD; ++held) {
    const int chunk = thread + THREADS * held;
    if (chunk < mine) read_x(x[held], a, (least + EVERY * chunk) * WIDTH);
  }
  bool masked[TOKENS];
#pragma unroll
  for (int token = 0; token < TOKENS; ++token)
    masked[token] = !a.flags || (token < a.tokens && a.flags[token]);
  const int outputs = a.projections[GATED ? 0 : which].outputs;
  const int column_from = FAR ? 0 : rank * SHARE;  // of the columns that this block finishes
  Added added;
  {
    const int c = column_from + thread % SHARE, token = thread / SHARE;
    const int output = tile * COLUMNS + c;
    if (token < a.tokens && c < COLUMNS && output < outputs)
      read_added(added, a, which, token, output);
  }
#if NORM
  float scale[TOKENS];
#pragma unroll
  for (int token = 0; token < TOKENS; ++token) scale[token] = 0.0f;
  for (int chunk = thread; chunk < chunks; chunk += THREADS) {
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      if (token >= a.tokens) break;
      float x[WIDTH];
      unpack(load_fresh(a.x + static_cast<long long>(token) * a.inputs + chunk * WIDTH), x);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) scale[token] = fmaf(x[i], x[i], scale[token]);
    }
  }
  block_sum(scale, scratch);
#pragma unroll
  for (int token = 0; token < TOKENS; ++token)
    scale[token] = rsqrtf(scale[token] / a.inputs + a.epsilon);
#endif

  // One round lists HELD chunks of each thread.
  int count[LISTS];
#pragma unroll
  for (int list = 0; list < LISTS; ++list) count[list] = 0;
  for (int start = 0; start < mine; start += THREADS * HELD) {
    u32 live[HELD][LISTS][TOKENS], either[HELD][LISTS], own = 0;
#pragma unroll
    for (int held = 0; held < HELD; ++held) {
      const int chunk = start + thread + THREADS * held;
#pragma unroll
      for (int list = 0; list < LISTS; ++list) either[held][list] = 0;
      if (chunk >= mine) continue;
      const int channel = (least + EVERY * chunk) * WIDTH;
      if (start) {
        read_gate(gate[held], a, which, least + EVERY * chunk);
        read_x(x[held], a, channel);
      }
#pragma unroll
      for (int token = 0; token < TOKENS; ++token) {
#if NORM
        x[held][token] = normed(x[held][token], gate[held], scale[token]);
#endif
        float now[WIDTH];
        unpack(x[held][token], now);
#pragma unroll
        for (int list = 0; list < LISTS; ++list) {
          u32 bits = 0;
#pragma unroll
          for (int i = 0; i < WIDTH; ++i)  // written so that NaN is kept
            bits |= u32(!(masked[token] && fabsf(now[i]) < gate[held].thresholds[list][i])) << i;
          live[held][list][token] = token < a.tokens ? bits : 0;
          either[held][list] |= live[held][list][token];
        }
      }
    }
#if AHEAD
    // The first live rows come towards the second-level cache while they are being listed.
    if (start == 0 && thread < AHEAD) {
#pragma unroll
      for (int list = 0; list < LISTS; ++list)
        fetch_rows(a.projections[GATED ? list : which], tile, least + EVERY * thread, either[0][list]);
    }
#endif
    // Both lists' counts in one word: exclusive sums over the block.
#pragma unroll
    for (int held = 0; held < HELD; ++held) {
      own += __popc(either[held][0]);
      if (LISTS == 2) own += __popc(either[held][LISTS - 1]) << 16;
    }
    u32 before = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u32 other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += other;
    }
    if (start) __syncthreads();  // totals are still being read
    if (lane == 31) totals[warp] = before;
    __syncthreads();
    const u32 total = lane < WARPS ? totals[lane] : 0;
    before += __reduce_add_sync(0xffffffffu, lane < warp ? total : 0) - own;
    const u32 all = __reduce_add_sync(0xffffffffu, total);
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      const int found = list ? all >> 16 : all & 0xffffu;
      int from = -count[list], to = from + found;
      if (WHOLE) {  // there is one round
        from = found * rank / SPLIT;
        to = found * (rank + 1) / SPLIT;
      }
      u32* listed = rows + list * a.capacity - from;
      Values* kept_values = values + list * a.capacity - from;
      int place = list ? before >> 16 : before & 0xffffu;
#pragma unroll
      for (int held = 0; held < HELD; ++held) {
        const int channel = (least + EVERY * (start + thread + THREADS * held)) * WIDTH;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          if (!(either[held][list] >> i & 1)) continue;
          if (!WHOLE || (place >= from && place < to)) {
            Values kept;
#pragma unroll
            for (int token = 0; token < TOKENS; ++token)
              kept.of[token] = live[held][list][token] >> i & 1 ? pick(x[held][token], i) : element(0);
            listed[place] = channel + i;
            kept_values[place] = kept;
          }
          ++place;
        }
      }
      count[list] += to - from;
    }
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_wait();  // the others have started, long ago

  const int column = tile * COLUMNS + thread % LANES * WIDTH, group = thread / LANES;
  float sums[LISTS][TOKENS][WIDTH];
  Walk walk;
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) sums[list][token][c] = 0.0f;
    const Projection& p = a.projections[GATED ? list : which];
    walk.weights[list] = reinterpret_cast<const char*>(p.weight + column);
    walk.strides[list] = p.stride * sizeof(element);
    walk.ends[list] = list ? count[0] + count[list] : count[0];
  }
  walk.rows = rows;
  walk.values = values;
  walk.gap = a.capacity - count[0];
  walk.policy = policy;
  walk.slots = reinterpret_cast<Vector*>(memory + a.slots) + thread;
  if (group < GROUPS && column < outputs) add_rows(walk, sums, group);

  // The groups' sums, one list and token at a time; those of one warp without shared memory. Each
  // block finishes its share of the tile's columns.
  constexpr bool FOLD = LANES < 32 && (LANES & (LANES - 1)) == 0 && LANES * GROUPS == THREADS;
  constexpr int SUMS = FOLD ? WARPS : GROUPS;
  const int row = FOLD ? warp : group;
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      float(&sum)[WIDTH] = sums[list][token];
      if (FOLD) {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2)
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
      }
      __syncthreads();
      if (FOLD ? lane < LANES : group < GROUPS) {
        float4* to = reinterpret_cast<float4*>(meet + row * COLUMNS + thread % LANES * WIDTH);
#pragma unroll
        for (int i = 0; i < WIDTH / 4; ++i)
          to[i] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
      }
      __syncthreads();
      for (int c = thread; c < COLUMNS; c += THREADS) {
        float all = 0.0f;
#pragma unroll
        for (int r = 0; r < SUMS; ++r) all += meet[r * COLUMNS + c];
        if (FAR) {
          const int place = (blockIdx.x / SPLIT * LISTS + list) * TOKENS + token;
          a.sums[(place * SPLIT + rank) * COLUMNS + c] = all;
        } else {
          float* to = &parts[rank][list][token][c % SHARE];
          if (CLUSTER > 1) write_to(to, c / SHARE, all); else *to = all;
        }
      }
    }
  }

  if (CLUSTER > 1) cluster_arrive(), cluster_wait(); else __syncthreads();
  if (FAR) {
    if (thread == 0) {
      u32* ticket = a.tickets + blockIdx.x / SPLIT;
      last = take_ticket(ticket) == SPLIT - 1;
      if (last) *ticket = 0;
    }
    __syncthreads();
    if (!last) return;
  }
  for (int i = thread; i < SHARE * a.tokens; i += THREADS) {
    const int c = column_from + i % SHARE, token = i / SHARE, output = tile * COLUMNS + c;
    if (c >= COLUMNS || output >= outputs) continue;
    if (i != thread) read_added(added, a, which, token, output);
    float found[LISTS];
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      float sum = 0.0f;
      if (FAR) {
        const int place = (blockIdx.x / SPLIT * LISTS + list) * TOKENS + token;
#pragma unroll
        for (int r = 0; r < SPLIT; ++r) sum += load_sum(a.sums + (place * SPLIT + r) * COLUMNS + c);
      } else {
#pragma unroll
        for (int r = 0; r < CLUSTER; ++r) sum += parts[r][list][token][i % SHARE];
      }
      found[list] = rounded(sum + to_float(added.bias[list]));
    }
    const long long place = token * (a.pitch ? a.pitch : outputs) + output;
#if GATED
    a.projections[0].out[place] =
        to_element(rounded(activate(found[0], a.activation)) * found[LISTS - 1]);
#else
    a.projections[which].out[place] = to_element(found[0] + to_float(added.residual));
#endif
  }
}
