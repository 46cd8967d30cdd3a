// y = W drop(x) with W of 4- or 8-bit codes: only live channels' codes and their groups' scales are
// read. The layout of W is that of wina/kernels/quantized.py.
//
// A cluster of CLUSTER blocks computes one tile of outputs for one token, a row's LANES pieces of 16
// bytes. Each block takes a stretch of the channels, cut into segments of SEGMENT channels of one
// group. A segment's live channels are listed in shared memory as 16-bit integers of one scale.
// LANES threads, a team, sum codes times integers over a part of a segment's list, two rows to an
// instruction, then scale the sums and add them to float32 totals. Totals meet in shared memory of
// the block, then of the cluster, in a fixed order: no workspace, no atomic, one result.
//
// Compile-time: ELEMENT (of x), SCALE (of scales, as ELEMENT), BITS, ZEROS (0 none, 1 points, 2
// minima), LANES (4 or 8), TEAMS, UNROLL (pairs of rows under way), CLUSTER, SEGMENT (32 or 64), GATED, NORM,
// BLOCKS.
#include "common.cuh"

constexpr int PIECE = 128 / BITS;  // outputs of 16 bytes
constexpr int COLUMNS = LANES * PIECE;
constexpr int THREADS = LANES * TEAMS;
constexpr int WARPS = THREADS / 32;
constexpr int LISTS = GATED ? 2 : 1;
constexpr int CHUNKS = SEGMENT / WIDTH;  // threads that list a segment

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
  const element* bias;  // or null
  element* out;         // (tokens, outputs)
  int row;              // bytes
  int outputs, tiles, group;
};

struct Arguments {
  Projection projections[3];
  const element* x;         // (tokens, inputs)
  const element* norm;      // RMSNorm's weight, or null
  const element* residual;  // (tokens, outputs), added to the first projection's output, or null
  float epsilon;
  int inputs, tokens, count, activation, capacity;  // capacity: segments of a block
  int parts;                                        // of a segment's list, one for each team
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

// Four scales (or minima) that lie together.
__device__ __forceinline__ void four_scales(const scale_type* from, float (&to)[4]) {
#if SCALE == 0
  const float4 found = __ldg(reinterpret_cast<const float4*>(from));
  to[0] = found.x, to[1] = found.y, to[2] = found.z, to[3] = found.w;
#else
  const uint2 found = __ldg(reinterpret_cast<const uint2*>(from));
  to[0] = scale_of(static_cast<u16>(found.x & 0xffffu)), to[1] = scale_of(found.x >> 16);
  to[2] = scale_of(static_cast<u16>(found.y & 0xffffu)), to[3] = scale_of(found.y >> 16);
#endif
}

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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wina_quantized(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) char memory[];
  __shared__ float scratch[WARPS];
  __shared__ float parts[LISTS][COLUMNS];
  // Of each list: entries (channel of the block, integer), then each segment's scale, sum and count.
  u32* entries = reinterpret_cast<u32*>(memory);
  float* segment_scale = reinterpret_cast<float*>(entries + LISTS * a.capacity * SEGMENT);
  int* segment_sum = reinterpret_cast<int*>(segment_scale + LISTS * a.capacity);
  int* segment_count = segment_sum + LISTS * a.capacity;
  float* meet = reinterpret_cast<float*>(memory);  // [WARPS][COLUMNS], when the lists are done

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

  let_next_start();
  const u64 policy = stream_policy();
  wait_for_inputs();

  float norm_scale = 1.0f;
#if NORM
  norm_scale = 0.0f;
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

  // CHUNKS neighbouring threads list a segment; whole warps take part in each round.
  const int rounds = (mine * CHUNKS + THREADS - 1) / THREADS;
  for (int round = 0; round < rounds; ++round) {
    const int chunk = round * THREADS + thread, segment = chunk / CHUNKS;
    const bool inside = segment < mine;
    const int local = chunk * WIDTH, channel = begin * SEGMENT + local;
    float now[WIDTH];
    if (inside) {
      unpack(load_fresh(x + channel), now);
#if NORM
      float weight[WIDTH];
      unpack(load_fresh(a.norm + channel), weight);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        now[i] = rounded(weight[i] * rounded(now[i] * norm_scale));
#endif
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) now[i] = 0.0f;
    }
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      const float* thresholds = a.projections[GATED ? list : which].thresholds + channel;
      u32 live = 0;
      float most = 0.0f;
      if (inside) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const float size = fabsf(now[i]);
          // Written so that NaN is kept; a zero adds nothing.
          const bool keep = !(size < __ldg(thresholds + i)) && size != 0.0f;
          live |= u32(keep) << i;
          if (keep) most = size > most || size != size ? size : most;
        }
      }
#pragma unroll
      for (int step = CHUNKS / 2; step; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, most, step);
        most = other > most || other != other ? other : most;
      }
      // What is not finite shows in every output: a scale of NaN.
      const bool finite = most <= 3.4028235e38f;
      const float scale = !finite ? __uint_as_float(0x7fc00000u)
                          : most > 5e-34f ? most * (1.0f / 32767) : 1.5e-38f;
      const float inverse = finite ? 1.0f / scale : 0.0f;
      int before = __popc(live), sum = 0;
      const int own = before;
#pragma unroll
      for (int step = 1; step < CHUNKS; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, before, step, CHUNKS);
        if (lane % CHUNKS >= step) before += other;
      }
      int place = segment * SEGMENT + before - own;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (!(live >> i & 1)) continue;
        const float scaled = finite ? fminf(fmaxf(now[i] * inverse, -32767.0f), 32767.0f) : 0.0f;
        const int whole = __float2int_rn(scaled);
        sum += whole;
        entries[list * a.capacity * SEGMENT + place++] =
            static_cast<u32>(local + i) | static_cast<u32>(whole) << 16;
      }
#pragma unroll
      for (int step = CHUNKS / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (inside && lane % CHUNKS == CHUNKS - 1) {
        segment_scale[list * a.capacity + segment] = scale;
        segment_sum[list * a.capacity + segment] = sum;
        segment_count[list * a.capacity + segment] = before;
      }
    }
  }
  __syncthreads();

  const int team = thread / LANES, piece = tile * LANES + thread % LANES;
  // The first output of the piece: its block's, and 4 for each piece in the block.
  const int output = piece / 4 * (4 * PIECE) + piece % 4 * 4;
  float totals[LISTS][PIECE];
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
#pragma unroll
    for (int i = 0; i < PIECE; ++i) totals[list][i] = 0.0f;
    const Projection& p = a.projections[GATED ? list : which];
    if (piece * 16 >= p.row) continue;
    const u8* codes = p.codes + static_cast<u64>(begin) * SEGMENT * p.row + piece * 16;
    for (int unit = team; unit < mine * a.parts; unit += TEAMS) {
      const int segment = unit / a.parts, part = unit % a.parts;
      const int count = segment_count[list * a.capacity + segment];
      const int pairs = (count + 1) / 2;
      const int first = 2 * (pairs * part / a.parts);
      const int last = min(count, 2 * (pairs * (part + 1) / a.parts));
      if (first >= last) continue;
      const u32* entry = entries + (list * a.capacity + segment) * SEGMENT;
      int sums[PIECE], sum = 0;
#pragma unroll
      for (int i = 0; i < PIECE; ++i) sums[i] = 0;
      for (int i = first; i < last; i += 2 * UNROLL) {
        Vector one[UNROLL], other[UNROLL];
        u32 values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          values[u] = 0;
          one[u] = other[u] = Vector{{0, 0, 0, 0}};
          if (i + 2 * u < last) {
            const u32 e = entry[i + 2 * u];
            one[u] = load_stream(codes + static_cast<u64>(e & 0xffffu) * p.row, policy);
            values[u] = e >> 16;
          }
          if (i + 2 * u + 1 < last) {
            const u32 e = entry[i + 2 * u + 1];
            other[u] = load_stream(codes + static_cast<u64>(e & 0xffffu) * p.row, policy);
            values[u] |= e & 0xffff0000u;
          }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          add_pair(one[u], other[u], values[u], sums);
          sum = __dp2a_lo(int(values[u]), 0x0101, sum);
        }
      }
      const float scale = segment_scale[list * a.capacity + segment];
      const float x_sum = scale * sum;
      const long long group = static_cast<long long>((begin + segment) * SEGMENT / p.group);
      const scale_type* scales = p.scales + group * p.outputs;
#pragma unroll
      for (int i = 0; i < 16 / BITS; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = output + 16 * (2 * i + h);
          if (at >= p.outputs) continue;
          float by[4], found[4];
          four_scales(scales + at, by);
#pragma unroll
          for (int k = 0; k < 4; ++k) found[k] = scale * sums[place_of(i, h, k)];
#if BITS == 4 && ZEROS != 2
#pragma unroll
          for (int k = 0; k < 4; ++k) found[k] -= 8.0f * x_sum;  // nibbles are stored 8 above
#endif
#if ZEROS == 1
          const u32 points = __ldg(reinterpret_cast<const u32*>(
              static_cast<const u8*>(p.zeros) + group * p.outputs + at));
#pragma unroll
          for (int k = 0; k < 4; ++k)
            found[k] -= x_sum * static_cast<signed char>(points >> 8 * k & 255u);
#endif
#pragma unroll
          for (int k = 0; k < 4; ++k)
            totals[list][place_of(i, h, k)] = fmaf(by[k], found[k], totals[list][place_of(i, h, k)]);
#if ZEROS == 2
          four_scales(static_cast<const scale_type*>(p.zeros) + group * p.outputs + at, by);
#pragma unroll
          for (int k = 0; k < 4; ++k)
            totals[list][place_of(i, h, k)] = fmaf(by[k], x_sum, totals[list][place_of(i, h, k)]);
#endif
        }
      }
    }
  }

  // The teams' totals: those of one warp by shuffles, those of the block through shared memory.
#pragma unroll
  for (int list = 0; list < LISTS; ++list) {
#pragma unroll
    for (int step = LANES; step < 32; step *= 2)
#pragma unroll
      for (int i = 0; i < PIECE; ++i)
        totals[list][i] += __shfl_xor_sync(0xffffffffu, totals[list][i], step);
    __syncthreads();
    if (lane < LANES) {
#pragma unroll
      for (int i = 0; i < 16 / BITS; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int column = lane / 4 * (4 * PIECE) + lane % 4 * 4 + 16 * (2 * i + h) + k;
            meet[warp * COLUMNS + column] = totals[list][place_of(i, h, k)];
          }
    }
    __syncthreads();
    for (int c = thread; c < COLUMNS; c += THREADS) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += meet[w * COLUMNS + c];
      parts[list][c] = sum;
    }
  }

  if (CLUSTER > 1) cluster_sync(); else __syncthreads();
  // Each block finishes its share of the tile's columns.
  constexpr int SHARE = (COLUMNS + CLUSTER - 1) / CLUSTER;
  for (int i = thread; i < SHARE; i += THREADS) {
    const int c = rank * SHARE + i, to = tile * COLUMNS + c;
    const Projection& p = a.projections[GATED ? 0 : which];
    if (c >= COLUMNS || to >= p.outputs) continue;
    float found[LISTS];
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < CLUSTER; ++r)
        sum += CLUSTER == 1 ? parts[list][c] : read_from(&parts[list][c], r);
      const element* bias = a.projections[GATED ? list : which].bias;
      if (bias) sum += to_float(__ldg(bias + to));
      found[list] = rounded(sum);
    }
    const long long place = static_cast<long long>(token) * p.outputs + to;
#if GATED
    p.out[place] = to_element(rounded(activate(found[0], a.activation)) * found[LISTS - 1]);
#else
    if (a.residual && which == 0) found[0] += to_float(load_one(a.residual + place));
    p.out[place] = to_element(found[0]);
#endif
  }
  if (CLUSTER > 1) cluster_sync();  // a block's shared memory must outlive its readers
}
