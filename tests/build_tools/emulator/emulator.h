// A CTA on a CPU, or a cluster of them: enough of CUDA's words and of a multiprocessor to run
// device code as it stands.
//
// Every thread of a CTA is a fiber; they take turns in an order drawn anew each time. What the GPU
// does asynchronously is done late and at random here: copies by TMA some turns after they were
// asked for, those of cp.async at any time up to their wait, products of warpgroups some turns
// after the last warp asked, reading shared memory and registers as they are at that moment. So a
// missing wait or a buffer that is released too early gives a wrong result, and a barrier that is
// never completed a report. `EMULATOR_SEED` begins another order, 1 if unset.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cstdlib>
#include <functional>

#include "host/flash.h"

#define __device__
#define __global__
#define __shared__ thread_local  // one for all fibers
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Dim {
  unsigned x;
};
extern Dim threadIdx, blockIdx, gridDim;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr uint32_t kSmemBase = 1024;
constexpr uint32_t kSmemBytes = 227 * 1024;
extern unsigned char* g_smem;  // kSmemBytes, at kSmemBase of the address space

// Ends the run with a message.
[[noreturn]] void stop(const char* what, ...);

// Lets others run until `is_true`.
void wait_until(const std::function<bool()>& is_true, const char* what);

unsigned char* at(uint32_t smem, uint32_t bytes);

// All lanes of a warp hand a value over and see everyone's.
struct Slots {
  uint64_t of[32][8];
};
const Slots& exchange(const uint64_t (&mine)[8]);

// For as many threads as `count`, barrier `id`; 0 is __syncthreads.
void barrier_arrive(int id, int count);
void barrier_sync(int id, int count);
// The same, and whether all of them say so.
bool barrier_all(int id, int count, bool x);

void mbarrier_init(uint32_t barrier, int count);
void mbarrier_arrive(uint32_t barrier, int bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
bool mbarrier_has_ended(uint32_t barrier, uint32_t parity);

// Copies 16 or 4 bytes, or zeros where `gmem` is null, between here and when its group is waited
// for.
void cp_async(uint32_t smem, const void* gmem, uint32_t bytes = 16);
void cp_async_commit();
void cp_async_wait(int pending);
// Arrives at a barrier some turns later, when this thread's copies are done.
void cp_async_arrive(uint32_t barrier);

void bulk_load(uint32_t smem, const void* gmem, int bytes, uint32_t barrier);
// To this CTA, or to the first `ctas` of its cluster.
void tma_load(uint32_t smem, const flash::TensorMap& map, uint32_t barrier, const int (&place)[4],
              unsigned ctas = 0);
void tma_store(uint32_t smem, const flash::TensorMap& map, const int (&place)[4]);
void bulk_add(float* gmem, uint32_t smem, int bytes);
void bulk_store(void* gmem, uint32_t smem, int bytes);
void tma_store_wait();

// What elements of products are.
enum Format { kHalf, kBf16, kE4m3 };
constexpr int bytes_of(Format format) { return format == kE4m3 ? 1 : 2; }

// One product of a warpgroup of this thread's accumulators; the rest as wgmma has it.
struct Product {
  float* c;
  int n;
  const uint32_t* a;  // null: by descriptor
  uint64_t a_descriptor, b_descriptor;
  bool b_by_columns;
  bool adds;
  Format format;
};
void start(const Product& product);
void commit();
void wait_products(int pending);

float to_float(uint16_t x, Format format);
uint16_t round_to(float x, Format format);
// Of the elements in a register.
float element_of(uint64_t packed, int index, Format format);

// For all threads of the cluster that have not ended.
void cluster_arrive();
void cluster_wait();
// How many CTAs the cluster has, and which of them this one is.
int cluster_size();
int cluster_rank();
// Where CTA `rank` of the cluster has what this one has at `smem`.
uint32_t of_cta(uint32_t smem, unsigned rank);
// Bytes on their way there, which a barrier there counts.
void send(uint32_t to, const void* bytes, int count, uint32_t barrier);

// Arrives at a barrier there.
void arrive_there(uint32_t barrier);

// Runs all CTAs of a grid: one cluster after the other, or a drawn number of them side by side
// that have at most `most` CTAs together.
void run_grid(unsigned grid, unsigned cluster, unsigned threads, unsigned most,
              const std::function<void()>& kernel);

template <class X, class Y>
uint64_t bits_of(Y x) {
  static_assert(sizeof(X) <= 8, "one slot");
  uint64_t bits = 0;
  const X exact = x;
  memcpy(&bits, &exact, sizeof(X));
  return bits;
}
template <class X>
X from_bits(uint64_t bits) {
  X x;
  memcpy(&x, &bits, sizeof(X));
  return x;
}

}  // namespace emulator

inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline uint32_t min(uint32_t x, uint32_t y) { return x < y ? x : y; }
inline uint32_t max(uint32_t x, uint32_t y) { return x > y ? x : y; }
inline float __fdividef(float x, float y) { return x / y; }
inline int __float_as_int(float x) { return emulator::from_bits<int>(emulator::bits_of<float>(x)); }
inline float __int_as_float(int x) { return emulator::from_bits<float>(emulator::bits_of<int>(x)); }
inline float __uint_as_float(uint32_t x) { return __int_as_float(static_cast<int>(x)); }
inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(__float_as_int(x)); }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }

inline void __syncthreads() { emulator::barrier_sync(0, 0); }
inline void __syncwarp() { emulator::exchange({}); }

template <class T>
T __shfl_xor_sync(uint32_t, T x, int mask) {
  const int lane = threadIdx.x % 32;
  const emulator::Slots& slots = emulator::exchange({emulator::bits_of<T>(x)});
  return emulator::from_bits<T>(slots.of[lane ^ mask][0]);
}

template <class T>
T __shfl_sync(uint32_t, T x, int lane) {
  const emulator::Slots& slots = emulator::exchange({emulator::bits_of<T>(x)});
  return emulator::from_bits<T>(slots.of[lane][0]);
}

template <class T>
T __shfl_up_sync(uint32_t, T x, int step) {
  const int lane = threadIdx.x % 32;
  const emulator::Slots& slots = emulator::exchange({emulator::bits_of<T>(x)});
  return emulator::from_bits<T>(slots.of[lane < step ? lane : lane - step][0]);
}

inline uint32_t __ballot_sync(uint32_t, bool x) {
  const emulator::Slots& slots = emulator::exchange({x});
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(slots.of[lane][0]) << lane;
  return votes;
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t x) {
  const emulator::Slots& slots = emulator::exchange({x});
  uint32_t sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += static_cast<uint32_t>(slots.of[lane][0]);
  return sum;
}
inline bool __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) == mask; }
