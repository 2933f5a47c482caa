// CTAs that run side by side and see one another's shared memory: since compute capability 9.0.
#pragma once

#include "host/flash.h"

namespace flash::ptx {

#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// All threads of a cluster that have not ended meet. Orders barriers that were initialised in front
// and fenced, and reads whose values were used, but no writes: that would wait for global memory.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// How many CTAs the cluster of this one has, and which of them it is.
__device__ inline int cluster_size() {
  int size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
#endif
  return size;
}

__device__ inline int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Where CTA `rank` of the cluster has in shared memory what this one has at `smem`.
__device__ inline uint32_t of_cta(uint32_t smem, int rank) {
  uint32_t there = smem;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem), "r"(rank));
#endif
  return there;
}

// Arrives at CTA `rank`'s barrier, by some threads only, without a branch.
__device__ inline void mbarrier_arrive_there_if(bool is_due, uint32_t barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred due; setp.ne.s32 due, %1, 0;"
      " @due mbarrier.arrive.shared::cluster.b64 _, [%0];}" ::"r"(of_cta(barrier, rank)),
      "r"(static_cast<int>(is_due))
      : "memory");
#endif
}

// A number on its way to another CTA, whose barrier counts its bytes.
__device__ inline void send(uint32_t to, uint32_t x, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to),
      "r"(x), "r"(barrier)
      : "memory");
#endif
}

// Four floats, or two, on their way to another CTA, whose barrier counts their bytes.
__device__ inline void send(uint32_t to, float4 x, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
#endif
}

__device__ inline void send(uint32_t to, float2 x, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(to),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
#endif
}

// Waits for the end of the first phase of a barrier, and sees what other CTAs sent.
__device__ inline void wait_for_sent(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred done;\n"
      "wait_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra wait_%=;}" ::"r"(barrier)
      : "memory");
#endif
}

}  // namespace flash::ptx
