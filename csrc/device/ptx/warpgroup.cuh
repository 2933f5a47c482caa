// What the warps of a CTA with roles do together, one instruction a function.
#pragma once

#include "host/flash.h"

namespace flash::ptx {

// Gives registers of each thread of a warpgroup back, or takes them. All its warps must come by.
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barriers by number, 1 to 15, for `threads` threads: waits for all of them, or only arrives.
__device__ inline void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The same, and whether `x` is true for all of them.
__device__ inline bool named_barrier_all(int barrier, int threads, bool x) {
  uint32_t all;
  asm volatile(
      "{.reg .pred x, all; setp.ne.s32 x, %3, 0;"
      " barrier.cta.red.and.pred all, %1, %2, x; selp.u32 %0, 1, 0, all;}"
      : "=r"(all)
      : "r"(barrier), "r"(threads), "r"(static_cast<int>(x))
      : "memory");
  return all != 0;
}

// x, which is the same in all lanes, as a value that the compiler knows to be: branches on it do
// not diverge, and addresses made from it stay in the warp's registers.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// The counterpart of ldmatrix_x4.
__device__ inline void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// And of ldmatrix_x4_trans.
__device__ inline void stmatrix_x4_trans(uint32_t smem, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace flash::ptx
