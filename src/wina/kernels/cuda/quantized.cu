// y = W drop(x) with W of 4- or 8-bit codes: only live channels' codes and their groups' scales are
// read. The layout of W is that of wina/kernels/quantized.py.
//
// A cluster of CLUSTER blocks computes one tile of outputs for one token, a row's LANES pieces of 16
// bytes. Each block takes a stretch of the channels, cut into segments of SEGMENT channels of one
// group. A segment's live channels are listed in shared memory as 16-bit integers of one scale, filled
// up to whole rounds. In a round a warp reads ROWS rows, two to a team of LANES threads, and sums codes
// times integers. The rounds of all segments, and of both lists where GATED, are shared out equally
// to the warps, whichever segment they are of; UNROLL rounds are under way. At the end of a segment
// the teams of a warp exchange their sums, so that each thread scales a few outputs and adds them to
// float32 totals. Totals meet in shared memory of the block, then of the cluster, in a fixed order:
// no workspace, no atomic, one result.
//
// Compile-time: ELEMENT (of x), SCALE (of scales, as ELEMENT), BITS, ZEROS (0 none, 1 points, 2
// minima), LANES (8, 16 or 32), TEAMS, UNROLL, CLUSTER, SEGMENT (32, 64 or 128), ONE (a group is the whole
// input and without zeros: its scales wait until the end), GATED, NORM, BLOCKS.
#include "common.cuh"

constexpr int PIECE = 128 / BITS;  // outputs of 16 bytes
constexpr int COLUMNS = LANES * PIECE;
constexpr int THREADS = LANES * TEAMS;
constexpr int WARPS = THREADS / 32;
constexpr int LISTS = GATED ? 2 : 1;
constexpr int CHUNKS = SEGMENT / WIDTH;  // threads that list a segment
constexpr int ROWS = 64 / LANES;         // of a round
constexpr int QUADS = PIECE / 4 * LANES / 32;  // of four outputs, that a thread scales
constexpr int SHARE = (COLUMNS + CLUSTER - 1) / CLUSTER;  // columns that a block finishes

#if SCALE == 0
typedef float scale_type;
#else
typedef u16 scale_type;
#endif

struct Projection {
  const u8* codes;           // (inputs, row)
  const scale_type* scales;  // (groups, outputs)
  const void* zeros;         // (groups, outputs), or null
  const float* thresholds;
  const element* bias;         // or null
  const element* sparse_bias;  // added to tokens that channels are dropped of, or null; not GATED
  element* out;                // (tokens, outputs)
  int row;              // bytes
  int outputs, tiles, shift;  // shift: of a segment's number to its group's
};

struct Arguments {
  Projection projections[3];
  const element* x;         // (tokens, inputs)
  const element* norm;      // RMSNorm's weight, or null
  const element* residual;  // (tokens, outputs), added to the first projection's output, or null
  const u8* flags;          // (tokens,): 0 where a token's channels are all live; or null; not GATED
  long long pitch;  // elements from token to token of the outputs; 0: of each projection its outputs
  float epsilon;
  int inputs, tokens, count, activation, capacity;  // capacity: segments of a block
};

__device__ __forceinline__ float activate(float x, int kind) {
  switch (kind) {
    case 0: return x / (1.0f + __expf(-x));
    case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default: return x != x ? x : fmaxf(x, 0.0f);
  }
}

__device__ __forceinline__ float scale_of(scale_type bits) {
#if SCALE == 0
  return bits;
#elif SCALE == 1  // float16: a multiplication mends the exponent's bias, of subnormals too
  const u32 magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  return __uint_as_float(__float_as_uint(__uint_as_float(magnitude) * 0x1p112f) | sign);
#else
  return __uint_as_float(static_cast<u32>(bits) << 16);
#endif
}

// Four scales (or minima) that lie together, as they are.
#if SCALE == 0
typedef float4 Quad;
__device__ __forceinline__ float scale_at(const Quad& quad, int k) {
  return k == 0 ? quad.x : k == 1 ? quad.y : k == 2 ? quad.z : quad.w;
}
#else
typedef uint2 Quad;
__device__ __forceinline__ float scale_at(const Quad& quad, int k) {
  return scale_of(static_cast<u16>((k < 2 ? quad.x : quad.y) >> k % 2 * 16));
}
#endif

// Bytes of two rows times their values, to the sums of four outputs.
__device__ __forceinline__ void add_bytes(u32 a, u32 b, u32 values, int* sums) {
  const int first = __byte_perm(a, b, 0x5140), last = __byte_perm(a, b, 0x7362);
  sums[0] = __dp2a_lo(int(values), first, sums[0]);
  sums[1] = __dp2a_hi(int(values), first, sums[1]);
  sums[2] = __dp2a_lo(int(values), last, sums[2]);
  sums[3] = __dp2a_hi(int(values), last, sums[3]);
}

// Sums lie as the bytes do: word m of the piece, then (4 bits) the lower nibbles, then the upper.
__device__ __forceinline__ void add_pair(const Vector& a, const Vector& b, u32 values,
                                         int (&sums)[PIECE]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#if BITS == 4
    add_bytes(a.words[m] & 0x0f0f0f0fu, b.words[m] & 0x0f0f0f0fu, values, sums + 8 * m);
    add_bytes(a.words[m] >> 4 & 0x0f0f0f0fu, b.words[m] >> 4 & 0x0f0f0f0fu, values,
              sums + 8 * m + 4);
#else
    add_bytes(a.words[m], b.words[m], values, sums + 4 * m);
#endif
  }
}

// Where the sum of code i (of its word), half h and output k is.
__device__ __forceinline__ constexpr int place_of(int i, int h, int k) {
  const int m = 2 * h + k / 2, pair = 2 * (k % 2);
  return BITS == 4 ? 8 * m + 4 * (i % 2) + pair + i / 2 : 4 * m + pair + i;
}

// Sums of the teams of a warp, exchanged: a thread keeps those of QUADS times four of its piece's
// outputs, of each the k-th here, added over all teams. Teams 1 and 3 keep h = 1, teams 2 and 3 the odd i.
__device__ __forceinline__ void exchange(const int (&sums)[PIECE], int team, int k,
                                         int (&to)[QUADS]) {
  constexpr int EACH = 16 / BITS;
  int half[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int low = sums[place_of(i, 0, k)], high = sums[place_of(i, 1, k)];
    if constexpr (LANES == 32) {
      to[2 * i] = low, to[2 * i + 1] = high;
    } else {
      const int mine = team & 1 ? high : low, theirs = team & 1 ? low : high;
      half[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, LANES);
      if constexpr (LANES == 16) to[i] = half[i];
    }
  }
  if constexpr (LANES == 8) {
#pragma unroll
    for (int i = 0; i < EACH; i += 2) {
      const int mine = team & 2 ? half[i + 1] : half[i], theirs = team & 2 ? half[i] : half[i + 1];
      to[i / 2] = mine + __shfl_xor_sync(0xffffffffu, theirs, 2 * LANES);
    }
  }
}

// Where a thread's quad is, in outputs from the first of its piece.
__device__ __forceinline__ int offset_of(int quad, int team) {
  const int i = LANES == 32 ? quad / 2 : LANES == 16 ? quad : 2 * quad + (team >> 1);
  const int h = LANES == 32 ? quad % 2 : team & 1;
  return 16 * (2 * i + h);
}

// Rounds of a list, one after the other.
struct Cursor {
  int segment, left;   // left: rounds of the segment from here
  const uint2* pairs;  // of this thread's team

  __device__ __forceinline__ void step(const int* rounds, const u32* entries) {
    pairs += ROWS / 2;
    if (--left) return;
    do ++segment; while (!rounds[segment]);
    left = rounds[segment];
    pairs = reinterpret_cast<const uint2*>(entries + segment * SEGMENT);
  }
};

// Finds a round that exists.
__device__ __forceinline__ Cursor cursor_at(int target, const int* rounds, int segments,
                                            const u32* entries) {
  const int lane = threadIdx.x % 32;
  int before = 0, first = 0;
#pragma unroll 1
  for (;; first += 32) {
    const int own = first + lane < segments ? rounds[first + lane] : 0;
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    const u32 past = __ballot_sync(0xffffffffu, before + sum > target);
    const int at = past ? __ffs(past) - 1 : 31;
    const int end = before + __shfl_sync(0xffffffffu, sum, at);
    if (past || first + 32 >= segments) {
      const int all = __shfl_sync(0xffffffffu, own, at), left = end - target;
      const u32* from = entries + (first + at) * SEGMENT + (all - left) * ROWS;
      return Cursor{first + at, left, reinterpret_cast<const uint2*>(from)};
    }
    before = end;
  }
}

// Of one chunk of channels.
struct Gate {
  float thresholds[LISTS][WIDTH];
  float norm[WIDTH];
};

__device__ __forceinline__ void read_gate(Gate& gate, const Arguments& a, int which, int channel) {
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
    const float* from = a.projections[GATED ? list : which].thresholds + channel;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      const Vector four = load_constant(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) gate.thresholds[list][i + j] = __uint_as_float(four.words[j]);
    }
  }
#if NORM
  unpack(load_constant(a.norm + channel), gate.norm);
#endif
}

// What is added to an output, read long before its sum is known.
struct Added {
  element bias[LISTS], sparse_bias[LISTS], residual;
  scale_type scale[LISTS];
};

__device__ __forceinline__ void read_added(Added& added, const Arguments& a, int which, int token,
                                           int output, bool masked) {
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
    const Projection& p = a.projections[GATED ? list : which];
    added.bias[list] = p.bias ? load_one(p.bias + output) : element(0);
    added.sparse_bias[list] =
        !GATED && masked && p.sparse_bias ? load_one(p.sparse_bias + output) : element(0);
    if (ONE) added.scale[list] = __ldg(p.scales + output);
  }
  added.residual = element(0);
  if (!GATED && a.residual && which == 0)
    added.residual =
        load_one(a.residual + static_cast<long long>(token) * a.projections[0].outputs + output);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wina_quantized(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) char memory[];
  __shared__ float scratch[WARPS];
  __shared__ float parts[CLUSTER][LISTS][SHARE];  // the blocks' sums of this one's share
  // Of each list: entries (channel of the block, integer), then each segment's scale, sum and rounds.
  u32* entries = reinterpret_cast<u32*>(memory);
  float* segment_scale = reinterpret_cast<float*>(entries + LISTS * a.capacity * SEGMENT);
  int* segment_sum = reinterpret_cast<int*>(segment_scale + LISTS * a.capacity);
  int* segment_rounds = segment_sum + LISTS * a.capacity;
  // [LISTS][WARPS][COLUMNS]
  const int lists = LISTS * a.capacity * (4 * SEGMENT + 12);
  float* meet = reinterpret_cast<float*>(memory + (lists + 15) / 16 * 16);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int rank = CLUSTER == 1 ? 0 : cluster_rank();
  int tile = blockIdx.x / CLUSTER, which = 0;
  int tiles = 0;
  for (int i = 0; i < (GATED ? 1 : a.count); ++i) tiles += a.projections[i].tiles;
  const int token = tile / tiles;
  tile -= token * tiles;
  if (!GATED) {
    while (tile >= a.projections[which].tiles) tile -= a.projections[which++].tiles;
  }
  const int all = a.inputs / SEGMENT;
  const int begin = min(all, rank * a.capacity), mine = min(all - begin, a.capacity);
  const element* x = a.x + static_cast<long long>(token) * a.inputs;
  const int outputs = a.projections[GATED ? 0 : which].outputs;

  let_next_start();
  if (CLUSTER > 1) cluster_arrive();
  Gate gate;
  if (thread < mine * CHUNKS) read_gate(gate, a, which, begin * SEGMENT + thread * WIDTH);
#if !ONE
  {  // Scales are read whatever lives, almost: into the second-level cache, while x is not there yet.
    constexpr int LINES = (COLUMNS * sizeof(scale_type) + 127) / 128;
    constexpr int MORE = ZEROS == 2 ? LINES : ZEROS == 1 ? (COLUMNS + 127) / 128 : 0;
    const int shift = a.projections[0].shift, least = begin >> shift;
    const int groups = mine ? (begin + mine - 1 >> shift) - least + 1 : 0;
#pragma unroll 1
    for (int i = thread; i < LISTS * groups * (LINES + MORE); i += THREADS) {
      const Projection& p = a.projections[GATED ? i % LISTS : which];
      const int line = i / LISTS % (LINES + MORE), group = least + i / LISTS / (LINES + MORE);
      const u64 first = static_cast<u64>(group) * outputs + tile * COLUMNS;
      const int column = line < LINES ? line * 128 / sizeof(scale_type)
                                      : (line - LINES) * (ZEROS == 1 ? 128 : 128 / sizeof(scale_type));
      if (tile * COLUMNS + column >= outputs) continue;
      if (line < LINES) fetch_line(p.scales + first + column);
      else if (ZEROS == 1) fetch_line(static_cast<const u8*>(p.zeros) + first + column);
      else fetch_line(static_cast<const scale_type*>(p.zeros) + first + column);
    }
  }
#endif
  const u64 policy = stream_policy();
  wait_for_inputs();

  const bool masked = GATED || !a.flags || a.flags[token];
  Vector found_x;
  if (thread < mine * CHUNKS) found_x = load_fresh(x + begin * SEGMENT + thread * WIDTH);
  Added added;
  {
    const int c = rank * SHARE + thread, to = tile * COLUMNS + c;
    if (thread < SHARE && c < COLUMNS && to < outputs) read_added(added, a, which, token, to, masked);
  }
  float norm_scale = 1.0f;
#if NORM
  norm_scale = 0.0f;
#pragma unroll 2
  for (int chunk = thread; chunk < a.inputs / WIDTH; chunk += THREADS) {
    float now[WIDTH];
    unpack(load_fresh(x + chunk * WIDTH), now);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) norm_scale = fmaf(now[i], now[i], norm_scale);
  }
#pragma unroll
  for (int step = 16; step; step /= 2)
    norm_scale += __shfl_xor_sync(0xffffffffu, norm_scale, step);
  if (lane == 0) scratch[warp] = norm_scale;
  __syncthreads();
  norm_scale = lane < WARPS ? scratch[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step; step /= 2)
    norm_scale += __shfl_xor_sync(0xffffffffu, norm_scale, step);
  norm_scale = rsqrtf(norm_scale / a.inputs + a.epsilon);
#endif

  // CHUNKS neighbouring threads list a segment; whole warps take part in each turn.
#pragma unroll 1
  for (int chunk = thread; chunk - lane < mine * CHUNKS; chunk += THREADS) {
    const int segment = chunk / CHUNKS, local = chunk * WIDTH, channel = begin * SEGMENT + local;
    const bool inside = segment < mine;
    float now[WIDTH];
    if (inside) {
      if (chunk != thread) {
        read_gate(gate, a, which, channel);
        found_x = load_fresh(x + channel);
      }
      unpack(found_x, now);
#if NORM
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        now[i] = rounded(gate.norm[i] * rounded(now[i] * norm_scale));
#endif
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) now[i] = 0.0f;
    }
u32 live[LISTS], most = 0;
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      live[list] = 0;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float size = fabsf(now[i]);
        // Written so that NaN is kept; a zero adds nothing.
        const bool keep =
            inside && !(masked && size < gate.thresholds[list][i]) && size != 0.0f;
        live[list] |= u32(keep) << i;
        // As bits, so that NaN is above all.
        most = keep ? max(most, __float_as_uint(size)) : most;
      }
    }
    const u32 members = (CHUNKS == 32 ? 0xffffffffu : (1u << CHUNKS % 32) - 1) << lane / CHUNKS * CHUNKS;
    most = __reduce_max_sync(members, most);
    // What is not finite shows in every output: a scale of NaN.
    const bool finite = most < 0x7f800000u;
    const float largest = __uint_as_float(most);
    const float scale = !finite ? __uint_as_float(0x7fc00000u)
                        : largest > 5e-34f ? largest * (1.0f / 32767) : 1.5e-38f;
    const float inverse = finite ? __fdividef(1.0f, scale) : 0.0f;
    u32 before = __popc(live[0]);  // of both lists, 16 bits each
    if (LISTS == 2) before |= __popc(live[LISTS - 1]) << 16;
    const u32 own = before;
#pragma unroll
    for (int step = 1; step < CHUNKS; step *= 2) {
      const u32 other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane % CHUNKS >= step) before += other;
    }
    int whole[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float scaled = finite ? fminf(fmaxf(now[i] * inverse, -32767.0f), 32767.0f) : 0.0f;
      whole[i] = __float2int_rn(scaled);
    }
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      u32* listed = entries + (list * a.capacity + segment) * SEGMENT;
      int place = (before - own) >> 16 * list & 0xffffu, sum = 0;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const bool keep = live[list] >> i & 1;
        sum += keep ? whole[i] : 0;
        if (keep) listed[place] = static_cast<u32>(local + i) | static_cast<u32>(whole[i]) << 16;
        place += keep;
      }
      sum = __reduce_add_sync(members, sum);
      if (inside && lane % CHUNKS == CHUNKS - 1) {
        const int rounds = (place + ROWS - 1) / ROWS;
#pragma unroll 1
        for (; place < rounds * ROWS; ++place) listed[place] = 0;
        segment_scale[list * a.capacity + segment] = scale;
        segment_sum[list * a.capacity + segment] = sum;
        segment_rounds[list * a.capacity + segment] = rounds;
      }
    }
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_wait();  // the others have started, long ago

  // This warp's rounds: of each list, from first to last.
  const int team = lane / LANES, piece = tile * LANES + lane % LANES;
  // The first output of the piece, in the tile: its block's, and 4 for each piece in the block.
  const int column = lane % LANES / 4 * (4 * PIECE) + lane % 4 * 4;
  int ends[LISTS];
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
    u32 rounds = 0;
#pragma unroll 1
    for (int i = lane; i < mine; i += 32) rounds += segment_rounds[list * a.capacity + i];
    ends[list] = __reduce_add_sync(0xffffffffu, rounds) + (list ? ends[0] : 0);
  }
  const int first = ends[LISTS - 1] * warp / WARPS, last = ends[LISTS - 1] * (warp + 1) / WARPS;
#pragma unroll 1
  for (int list = 0; list < LISTS; ++list) {
    const Projection& p = a.projections[GATED ? list : which];
    const int start = list ? ends[0] : 0, end = list ? ends[LISTS - 1] : ends[0];
    const int from = max(first, start) - start, to = min(last, end) - start;
    float totals[QUADS][4];
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
      for (int k = 0; k < 4; ++k) totals[q][k] = 0.0f;
    if (from < to) {
      const u32* listed = entries + list * a.capacity * SEGMENT + 2 * team;
      const int* rounds = segment_rounds + list * a.capacity;
      const bool inside = piece * 16 < p.row;
      const u8* codes = p.codes + static_cast<u64>(begin) * SEGMENT * p.row + piece * 16;
      const u32 row = p.row;
      Cursor now = cursor_at(from, rounds, mine, listed), ahead = now;
      int sums[PIECE];
#pragma unroll
      for (int i = 0; i < PIECE; ++i) sums[i] = 0;
      Vector one[UNROLL], other[UNROLL];
      u32 values[UNROLL];
      const auto start_round = [&](int u) {
        const uint2 pair = *ahead.pairs;
        // A value of 0 (also of what fills a round up) needs no row: codes are finite, whatever they are.
        if (inside && pair.x >> 16)
          one[u] = load_stream(codes + static_cast<u64>(pair.x & 0xffffu) * row, policy);
        if (inside && pair.y >> 16)
          other[u] = load_stream(codes + static_cast<u64>(pair.y & 0xffffu) * row, policy);
        values[u] = pair.x >> 16 | (pair.y & 0xffff0000u);
      };
#if !ONE
      Quad scales[QUADS];
#if ZEROS == 1
      u32 points[QUADS];
#elif ZEROS == 2
      Quad minima[QUADS];
#endif
      const auto read_scales = [&](int segment) {  // long before they are needed
        const u64 group = static_cast<u64>(begin + segment >> p.shift) * p.outputs;
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
          const int at = tile * COLUMNS + column + offset_of(q, team);
          if (at >= p.outputs) continue;
          scales[q] = __ldg(reinterpret_cast<const Quad*>(p.scales + group + at));
#if ZEROS == 1
          points[q] = __ldg(reinterpret_cast<const u32*>(static_cast<const u8*>(p.zeros) + group + at));
#elif ZEROS == 2
          minima[q] = __ldg(reinterpret_cast<const Quad*>(
              static_cast<const scale_type*>(p.zeros) + group + at));
#endif
        }
      };
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        scales[q] = Quad{};
#if ZEROS == 1
        points[q] = 0;
#elif ZEROS == 2
        minima[q] = Quad{};
#endif
      }
#endif
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        one[u] = other[u] = Vector{{0, 0, 0, 0}};
        if (from + u >= to) continue;
        if (u) ahead.step(rounds, listed);
        start_round(u);
      }
#if !ONE
      read_scales(now.segment);
#endif
      // Only the warp with a segment's first round subtracts its zeros.
      bool whole = now.left == rounds[now.segment];
#pragma unroll 1
      for (int r = from; r < to; r += UNROLL) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          if (r + u >= to) break;
          add_pair(one[u], other[u], values[u], sums);
          if (r + u + UNROLL < to) {
            ahead.step(rounds, listed);
            start_round(u);
          }
          const bool more = r + u + 1 < to;
          if (now.left > 1 && more) {
            --now.left;
            continue;
          }
          const float scale = segment_scale[list * a.capacity + now.segment];
          const float x_sum = whole ? scale * segment_sum[list * a.capacity + now.segment] : 0.0f;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            int kept[QUADS];
            exchange(sums, team, k, kept);
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
              float found = scale * kept[q];
#if BITS == 4 && ZEROS != 2
              found -= 8.0f * x_sum;  // nibbles are stored 8 above
#endif
#if ZEROS == 1
              found -= x_sum * static_cast<signed char>(points[q] >> 8 * k & 255u);
#endif
#if ONE
              totals[q][k] += found;
#else
              totals[q][k] = fmaf(scale_at(scales[q], k), found, totals[q][k]);
#endif
#if ZEROS == 2
              totals[q][k] = fmaf(scale_at(minima[q], k), x_sum, totals[q][k]);
#endif
            }
          }
#pragma unroll
          for (int i = 0; i < PIECE; ++i) sums[i] = 0;
          if (more) {
            now.step(rounds, listed);
            whole = true;
#if !ONE
            read_scales(now.segment);
#endif
          }
        }
      }
    }
    float* to_meet = meet + (list * WARPS + warp) * COLUMNS + column;
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
      *reinterpret_cast<float4*>(to_meet + offset_of(q, team)) =
          make_float4(totals[q][0], totals[q][1], totals[q][2], totals[q][3]);
  }

  __syncthreads();
#pragma unroll 2
  for (int i = thread; i < LISTS * COLUMNS; i += THREADS) {
    const int list = i / COLUMNS, c = i % COLUMNS;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += meet[(list * WARPS + w) * COLUMNS + c];
    float* to = &parts[rank][list][c % SHARE];
    if (CLUSTER > 1) write_to(to, c / SHARE, sum); else *to = sum;
  }

  if (CLUSTER > 1) cluster_arrive(), cluster_wait(); else __syncthreads();
#pragma unroll 1
  for (int i = thread; i < SHARE; i += THREADS) {
    const int c = rank * SHARE + i, to = tile * COLUMNS + c;
    if (c >= COLUMNS || to >= outputs) continue;
    if (i != thread) read_added(added, a, which, token, to, masked);
    float found[LISTS];
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < CLUSTER; ++r) sum += parts[r][list][i];
      if (ONE) sum *= scale_of(added.scale[list]);
      found[list] = rounded(sum + to_float(added.bias[list]) + to_float(added.sparse_bias[list]));
    }
    const long long pitch = !GATED && a.pitch ? a.pitch : outputs, place = token * pitch + to;
#if GATED
    a.projections[0].out[place] =
        to_element(rounded(activate(found[0], a.activation)) * found[LISTS - 1]);
#else
    a.projections[which].out[place] = to_element(found[0] + to_float(added.residual));
#endif
  }
}
