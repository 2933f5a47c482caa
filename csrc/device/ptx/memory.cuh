// Moves between global memory, shared memory and registers, one instruction a function.
#pragma once

#include "host/flash.h"

namespace flash::ptx {

__device__ inline uint32_t smem_address(const void* ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(ptr));
}

// x, as a value that the compiler knows nothing of but that it is not negative: what is computed
// from it stays where it stands, in front of no loop, and takes no register there.
__device__ inline int opaque(int x) {
  asm volatile("" : "+r"(x));
  __builtin_assume(x >= 0);
  return x;
}

// The same for a float.
__device__ inline float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// The same for a pointer: offsets from it stay constants of the instructions that use it.
__device__ inline const uint16_t* opaque(const uint16_t* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Copies 16 bytes, or writes zeros where `valid` is false; bypasses L1.
__device__ inline void cp_async_16(uint32_t smem, const void* gmem, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
               "r"(bytes)
               : "memory");
}

// The same of what is read once: it goes from L2 before anything else does.
__device__ inline void cp_async_16_once(uint32_t smem, const void* gmem, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "{.reg .b64 once;\n"
      "createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, once;}" ::"r"(smem),
      "l"(gmem), "r"(bytes)
      : "memory");
}

// Copies 16 bytes if `is_due`.
__device__ inline void cp_async_16_if(bool is_due, uint32_t smem, const void* gmem) {
  asm volatile(
      "{.reg .pred due; setp.ne.s32 due, %2, 0;"
      " @due cp.async.cg.shared.global.L2::128B [%0], [%1], 16;}" ::"r"(smem),
      "l"(gmem), "r"(static_cast<int>(is_due))
      : "memory");
}

// Copies 4 bytes, or writes zeros where `valid` is false.
__device__ inline void cp_async_4(uint32_t smem, const void* gmem, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(gmem), "r"(bytes)
               : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` committed groups are still under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at a barrier in shared memory when all copies that this thread has asked for are done.
__device__ inline void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

__device__ inline void st_shared_32(uint32_t smem, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(x) : "memory");
}

__device__ inline uint32_t ld_shared_32(uint32_t smem) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(smem) : "memory");
  return x;
}

__device__ inline float ld_shared_f32(uint32_t smem) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(smem) : "memory");
  return x;
}

__device__ inline float2 ld_shared_v2_f32(uint32_t smem) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(smem) : "memory");
  return x;
}

__device__ inline uint4 ld_shared_128(uint32_t smem) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(smem)
               : "memory");
  return x;
}

__device__ inline void st_shared_128(uint32_t smem, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

__device__ inline void st_global_128(void* gmem, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

__device__ inline void st_global_64(uint64_t* gmem, uint64_t x) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(gmem), "l"(x) : "memory");
}

// What memory held before x was added.
__device__ inline uint64_t atomic_add(uint64_t* gmem, uint64_t x) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(gmem), "l"(x)
               : "memory");
  return before;
}

// The same, in order: behind what this thread did, or saw of others at a barrier, and in front of
// what it does next, for all threads of the device.
__device__ inline uint64_t atomic_add_in_order(uint64_t* gmem, uint64_t x) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(gmem), "l"(x)
               : "memory");
  return before;
}

// What memory held before; it holds x now, if that was `expected`.
__device__ inline int atomic_compare_exchange(int32_t* gmem, int expected, int x) {
  int before;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(gmem), "r"(expected), "r"(x)
               : "memory");
  return before;
}
__device__ inline uint64_t atomic_compare_exchange(uint64_t* gmem, uint64_t expected, uint64_t x) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(gmem), "l"(expected), "l"(x)
               : "memory");
  return before;
}

// Adds to memory without a reply.
__device__ inline void red_add_f32(float* gmem, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(gmem), "f"(x) : "memory");
}

// Waits until a counter is `x` or `y`, and tells which; what its writers did before they added to
// it is seen from here on. Sleeps for `sleep_ns` or so before it looks again.
__device__ inline int wait_until_either(const int32_t* gmem, int x, int y, uint32_t sleep_ns = 0) {
  for (;;) {
    int found;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(gmem) : "memory");
    if (found == x || found == y) return found;
    if (sleep_ns > 0) asm volatile("nanosleep.u32 %0;" ::"r"(sleep_ns));
  }
}
__device__ inline void wait_until_equal(const int32_t* gmem, int x, uint32_t sleep_ns = 0) {
  wait_until_either(gmem, x, x, sleep_ns);
}

// What a counter says, in no order with anything else.
__device__ inline int ld_relaxed(const int32_t* gmem) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(gmem));
  return x;
}

// Adds to a counter, behind what this thread did before, and what it saw of others at a barrier.
__device__ inline void red_release_add(int32_t* gmem, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(gmem), "r"(x) : "memory");
}

// What was written to memory is read from there again, in place of registers that held it.
__device__ inline void forget() { asm volatile("" ::: "memory"); }

// Waits for a value that nobody needs: for the line of memory that it stands in.
__device__ inline void touch(uint32_t x) {
  asm volatile(
      "{.reg .pred never; setp.eq.u32 never, %0, 0x80A5C3E1; @never nanosleep.u32 0;}" ::"r"(x));
}

// Waits for the kernel in front on the stream, if this one was allowed to begin beside its end; and
// lets the one behind begin, if it is.
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_kernel_behind_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace flash::ptx
