// Barriers in shared memory that count arrivals and bytes, one instruction a function.
#pragma once

#include "host/flash.h"

namespace flash::ptx {

// A phase of the barrier ends with `count` arrivals and all bytes that were announced.
__device__ inline void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Lets asynchronous copies see barriers that this thread has initialised.
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same by some threads only, without a branch: control flow stays the same for all.
__device__ inline void mbarrier_arrive_if(bool is_due, uint32_t barrier) {
  asm volatile(
      "{.reg .pred due; setp.ne.s32 due, %1, 0;"
      " @due mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(barrier),
      "r"(static_cast<int>(is_due))
      : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, and so on. The
// phase in front of the first counts as ended.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  constexpr uint32_t kSleepNs = 10000000;  // at most, before the instruction asks again
  asm volatile(
      "{.reg .pred done;\n"
      "wait_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@!done bra wait_%=;}" ::"r"(barrier),
      "r"(parity), "n"(kSleepNs)
      : "memory");
}

// Whether that phase has ended.
__device__ inline bool mbarrier_has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t has_ended;
  asm volatile(
      "{.reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;"
      " selp.u32 %0, 1, 0, done;}"
      : "=r"(has_ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return has_ended != 0;
}

}  // namespace flash::ptx
