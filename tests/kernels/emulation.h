// Just enough of CUDA to run the kernels of src/wina/kernels/cuda on a CPU, a cluster at a time:
// a thread is a fiber that runs until it waits. It replaces what common.cuh writes in PTX. It checks
// that loads are aligned and inside the given memory, that nothing is read before
// griddepcontrol.wait but constants, that no barrier is left by some threads, and that asynchronous
// copies are waited for: their target is poisoned until then.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("cuda_shared"))) static
#define __align__(n)

struct Index { unsigned x; };
static Index threadIdx, blockIdx;
__attribute__((used)) __shared__ char one_at_least[16];

namespace emulation {
struct Range { const char* from; long long size; };
struct Copy { char* to; const void* from; };
struct Barrier { int arrived = 0; long generation = 0; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int block, thread;
  bool done = false, waited = false, arrived = false;
  long generation = 0;  // of the cluster's barrier
  int meetings = 0;
  std::vector<std::vector<Copy>> copies;
};

static int threads, cluster;
static long progress;
static std::vector<Fiber> fibers;
static Fiber* now;
static ucontext_t scheduler;
static std::vector<Range> ranges;
static std::vector<std::vector<char>> dynamic;
static std::vector<Barrier> blocks, warps;
static Barrier whole;
static std::vector<uint64_t> slots;  // of each thread, for exchanges inside a warp
static std::vector<std::vector<char>> statics;
extern "C" char __start_cuda_shared[], __stop_cuda_shared[];

[[noreturn]] static void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}
static void yield() { swapcontext(&now->context, &scheduler); }
static void meet(Barrier& barrier, int count) {
  ++progress;
  const long generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}
static void check(const void* address, int size) {
  if (reinterpret_cast<uintptr_t>(address) % size) fail("a load is not aligned");
  const char* place = static_cast<const char*>(address);
  for (const Range& range : ranges)
    if (place >= range.from && place + size <= range.from + range.size) return;
  fail("a load is outside of the memory given");
}
static int warp_of(int thread) { return now->block * (threads / 32) + thread / 32; }
template <class T>
static T exchange(T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int first = now->block * threads + now->thread / 32 * 32;
  slots[first + now->thread % 32] = bits;
  meet(warps[warp_of(now->thread)], 32);
  bits = slots[first + (from < 0 || from > 31 ? now->thread % 32 : from)];
  meet(warps[warp_of(now->thread)], 32);
  T found;
  std::memcpy(&found, &bits, sizeof(T));
  return found;
}
static char* memory() { return dynamic[now->block].data(); }
}  // namespace emulation

static void __syncthreads() { emulation::meet(emulation::blocks[emulation::now->block], emulation::threads); }
template <class T>
static T __shfl_xor_sync(unsigned, T value, int step) {
  return emulation::exchange(value, int(threadIdx.x % 32) ^ step);
}
template <class T>
static T __shfl_up_sync(unsigned, T value, int step) {
  return emulation::exchange(value, int(threadIdx.x % 32) - step);
}
static unsigned __reduce_add_sync(unsigned, unsigned value) {
  unsigned sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += emulation::exchange(value, lane);
  return sum;
}
static bool __any_sync(unsigned, bool value) { return __reduce_add_sync(0, value) != 0; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
#define __expf(x) std::exp(x)
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
struct alignas(16) float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
static T __ldg(const T* address) { emulation::check(address, sizeof(T)); return *address; }

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#if ELEMENT == 0
typedef float element;
static float to_float(element bits) { return bits; }
static element to_element(float value) { return value; }
#elif ELEMENT == 1
typedef u16 element;
static float to_float(element bits) { _Float16 x; std::memcpy(&x, &bits, 2); return float(x); }
static element to_element(float value) { _Float16 x = _Float16(value); u16 b; std::memcpy(&b, &x, 2); return b; }
#else
typedef u16 element;
static float to_float(element bits) { return __uint_as_float(u32(bits) << 16); }
static element to_element(float value) {
  const u32 bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#endif
constexpr int WIDTH = 16 / sizeof(element);
struct Vector;
template <class V = Vector>
static V load_constant(const void* address) { emulation::check(address, 16); return *static_cast<const V*>(address); }
template <class V = Vector>
static V load_stream(const void* address, u64) { return load_constant<V>(address); }
template <class V = Vector>
static V load_fresh(const void* address) {
  if (!emulation::now->waited) emulation::fail("read before the kernel before has ended");
  return load_constant<V>(address);
}
static element load_one(const element* address) {
  if (!emulation::now->waited) emulation::fail("read before the kernel before has ended");
  return __ldg(address);
}
static u8 load_flag(const u8* address) {
  if (!emulation::now->waited) emulation::fail("read before the kernel before has ended");
  return __ldg(address);
}
static long long load_count(const long long* address) {
  if (!emulation::now->waited) emulation::fail("read before the kernel before has ended");
  return __ldg(address);
}
static u32 take_ticket(u32* next) { emulation::check(next, 4); return (*next)++; }
static float load_sum(const float* address) { return *address; }
static long long peek(const long long* address) { return __ldg(address); }
static void fetch(const void* address) { emulation::check(address, 16); }
static u64 stream_policy() { return 0; }
static void copy_stream(void* to, const void* address, u64) {
  emulation::check(address, 16);
  const char* first = emulation::memory();
  const char* place = static_cast<char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % 16 || place < first ||
      place + 16 > first + emulation::dynamic[emulation::now->block].size())
    emulation::fail("a copy's target is not in shared memory");
  std::memset(to, 0xff, 16);
  auto& copies = emulation::now->copies;
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({static_cast<char*>(to), address});
}
static void end_of_copies() {
  if (emulation::now->copies.empty()) emulation::now->copies.emplace_back();
  emulation::now->copies.emplace_back();
}
template <int LEFT>
static void wait_for_copies() {
  auto& copies = emulation::now->copies;  // the last one is still open
  while (int(copies.size()) > LEFT + 1) {
    for (const auto& copy : copies.front()) std::memcpy(copy.to, copy.from, 16);
    copies.erase(copies.begin());
  }
}
static void wait_for_inputs() { emulation::now->waited = true; }
static void let_next_start() {}
static u32 cluster_rank() { return emulation::now->block; }
static void cluster_arrive() {
  using namespace emulation;
  if (now->arrived) fail("it arrives twice at the cluster's barrier");
  ++progress;
  now->arrived = true;
  now->generation = whole.generation;
  if (++whole.arrived == threads * cluster) {
    whole.arrived = 0;
    ++whole.generation;
  }
}
static void cluster_wait() {
  using namespace emulation;
  if (!now->arrived) fail("it waits at the cluster's barrier without having arrived");
  ++progress;
  while (whole.generation == now->generation) yield();
  now->arrived = false;
  ++now->meetings;
}
static void write_to(float* mine, int rank, float value) {
  using namespace emulation;
  if (!now->meetings) fail("another block's memory is written before it is known to have started");
  const char* place = reinterpret_cast<const char*>(mine);
  if (place >= __start_cuda_shared && place < __stop_cuda_shared) {
    if (rank == now->block) *mine = value;
    else std::memcpy(statics[rank].data() + (place - __start_cuda_shared), &value, 4);
  } else {
    std::memcpy(dynamic[rank].data() + (place - memory()), &value, 4);
  }
}

#include "kernel.cu"

static const Arguments* arguments;
static void body() {
  KERNEL(*arguments);
  if (emulation::now->arrived) emulation::fail("it never waited at the cluster's barrier");
  for (const auto& group : emulation::now->copies)
    if (!group.empty()) emulation::fail("a copy was not waited for");
  emulation::now->done = true;
  ++emulation::progress;
  emulation::yield();
}

extern "C" void launch(int grid, int threads_, int cluster_, int shared, const void* given,
                       const long long* memory, int count) {
  using namespace emulation;
  threads = threads_;
  cluster = cluster_;
  arguments = static_cast<const Arguments*>(given);
  ranges.clear();
  for (int i = 0; i < count; ++i)
    ranges.push_back({reinterpret_cast<const char*>(memory[2 * i]), memory[2 * i + 1]});
  const size_t size = __stop_cuda_shared - __start_cuda_shared;
  for (int first = 0; first < grid; first += cluster) {
    fibers = std::vector<Fiber>(threads * cluster);
    dynamic.assign(cluster, std::vector<char>());
    statics.assign(cluster, std::vector<char>(size, char(0xff)));
    for (auto& one : dynamic) {
      one.reserve(shared + 16);
      one.assign(shared, char(0xff));
    }
    blocks.assign(cluster, Barrier());
    warps.assign(cluster * threads / 32, Barrier());
    whole = Barrier();
    slots.assign(cluster * threads, 0);
    for (int i = 0; i < threads * cluster; ++i) {
      Fiber& fiber = fibers[i];
      fiber.block = i / threads;
      fiber.thread = i % threads;
      fiber.stack.resize(96 << 10);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, body, 0);
    }
    for (bool running = true; running;) {
      const long before = progress;
      running = false;
      for (int block = 0; block < cluster; ++block) {
        std::memcpy(__start_cuda_shared, statics[block].data(), size);
        for (int i = block * threads; i < (block + 1) * threads; ++i) {
          if (fibers[i].done) continue;
          now = &fibers[i];
          threadIdx.x = now->thread;
          blockIdx.x = first + block;
          swapcontext(&scheduler, &now->context);
          running = running || !now->done;
        }
        std::memcpy(statics[block].data(), __start_cuda_shared, size);
      }
      if (running && progress == before) fail("some threads wait for others that never come");
    }
  }
  fibers = std::vector<Fiber>();  // their stacks are large, and many kernels are loaded
}
