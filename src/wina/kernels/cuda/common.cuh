// What the kernels share. Compiled at run time by NVRTC, without any header.
// ELEMENT: 0 float32, 1 float16, 2 bfloat16.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if ELEMENT == 0
typedef float element;
#else
typedef u16 element;
#endif
constexpr int WIDTH = 16 / sizeof(element);  // elements of a 16-byte load

__device__ __forceinline__ float to_float(element bits) {
#if ELEMENT == 0
  return bits;
#elif ELEMENT == 1
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return __uint_as_float(static_cast<u32>(bits) << 16);
#endif
}

__device__ __forceinline__ element to_element(float value) {
#if ELEMENT == 0
  return value;
#elif ELEMENT == 1
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#endif
}

__device__ __forceinline__ float rounded(float value) { return to_float(to_element(value)); }

struct alignas(16) Vector {
  u32 words[4];
};

__device__ __forceinline__ void unpack(const Vector& vector, float (&values)[WIDTH]) {
#if ELEMENT == 0
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(vector.words[i]);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if ELEMENT == 2
    values[2 * i] = __uint_as_float(vector.words[i] << 16);
    values[2 * i + 1] = __uint_as_float(vector.words[i] & 0xffff0000u);
#else
    values[2 * i] = to_float(static_cast<u16>(vector.words[i] & 0xffffu));
    values[2 * i + 1] = to_float(static_cast<u16>(vector.words[i] >> 16));
#endif
  }
#endif
}

__device__ __forceinline__ Vector pack(const float (&values)[WIDTH]) {
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if ELEMENT == 0
    vector.words[i] = __float_as_uint(values[i]);
#else
    vector.words[i] = to_element(values[2 * i]) |
                      static_cast<u32>(to_element(values[2 * i + 1])) << 16;
#endif
  }
  return vector;
}

__device__ __forceinline__ element pick(const Vector& vector, int i) {
#if ELEMENT == 0
  return __uint_as_float(vector.words[i]);
#else
  return static_cast<element>(vector.words[i / 2] >> i % 2 * 16);
#endif
}

// Weights are read once a step: they should not push the cache's other contents out.
__device__ __forceinline__ u64 stream_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

#if PREFETCH == 128
#define NEARBY ".L2::128B"
#elif PREFETCH == 256
#define NEARBY ".L2::256B"
#else
#define NEARBY ""
#endif

__device__ __forceinline__ Vector load_stream(const void* address, u64 policy) {
  Vector v;
  asm volatile(
      "ld.global.nc.L1::no_allocate.L2::cache_hint" NEARBY ".v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
      : "l"(address), "l"(policy));
  return v;
}

// The same into 16 bytes of shared memory, without waiting; a thread waits for its own copies.
__device__ __forceinline__ void copy_stream(void* to, const void* address, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint" NEARBY " [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(address), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(LEFT) : "memory");
}

// Into the second-level cache, for later.
__device__ __forceinline__ void fetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

// What no kernel writes. Volatile: such loads stay before wait_for_inputs where they stand before it.
__device__ __forceinline__ Vector load_constant(const void* address) {
  Vector v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address));
  return v;
}

// Past the first-level cache: the kernel before may still be writing when this one starts.
__device__ __forceinline__ Vector load_fresh(const void* address) {
  Vector v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ element load_one(const element* address) {
  element value;
#if ELEMENT == 0
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
#else
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(value) : "l"(address) : "memory");
#endif
  return value;
}

__device__ __forceinline__ u8 load_flag(const u8* address) {
  u32 value;
  asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return static_cast<u8>(value);
}

__device__ __forceinline__ long long load_count(const long long* address) {
  long long value;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// The same before wait_for_inputs: perhaps of a step before.
__device__ __forceinline__ long long peek(const long long* address) {
  long long value;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(value) : "l"(address));
  return value;
}

// The 128 bytes around an address towards the second-level cache. It takes nothing from there, so it
// may stand before wait_for_inputs. (The copy engine's prefetch of a whole row was slower than none.)
__device__ __forceinline__ void fetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

// Programmatic dependent launch: this kernel may start before the one before it has ended.
__device__ __forceinline__ void wait_for_inputs() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Arriving and waiting come in turns, by all threads.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes a block's shared memory at the place that is mine in this one. That block must have started.
__device__ __forceinline__ void write_to(float* mine, int rank, float value) {
  u32 local = static_cast<u32>(__cvta_generic_to_shared(mine)), remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" : : "r"(remote), "f"(value) : "memory");
}

// A number for each block that asks, from 0 on. What its block wrote before, seen by this thread
// (after __syncthreads), is seen by those with higher numbers.
__device__ __forceinline__ u32 take_ticket(u32* next) {
  u32 mine;
  asm volatile("fence.acq_rel.gpu; atom.relaxed.gpu.global.add.u32 %0, [%1], 1; fence.acq_rel.gpu;"
               : "=r"(mine)
               : "l"(next)
               : "memory");
  return mine;
}
// What another block of this launch wrote: past the first-level cache.
__device__ __forceinline__ float load_sum(const float* address) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}
