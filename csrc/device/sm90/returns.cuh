// How a consumer gives buffers back to those who load.
#pragma once

#include "sm90/own.cuh"
#include "sm90/pipeline.cuh"

namespace flash::sm90 {

template <class Cfg>
struct Returns {
  const Pipeline<Cfg>& pipe;
  const int consumer;

  // By one lane: products are over for the whole warpgroup at once.
  template <class Ring>
  __device__ void block(const Ring& ring, uint32_t block) const {
    const int thread = Own::thread();
    if constexpr (Cfg::kMayPair) {
      // In each CTA of the pair.
      ptx::mbarrier_arrive_there_if(thread < pipe.ctas(), ring.empty(block), thread % 2);
    } else {
      ring.arrive_empty_if(thread == 0, block);
    }
  }

  // Blocks that no product reads. A warp that came late would look for a phase that is two behind:
  // so all meet.
  template <class Ring>
  __device__ __forceinline__ void unread(const Ring& ring, uint32_t first, int blocks) const {
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) ring.wait_full(first + i);
    ptx::named_barrier_sync(1 + consumer, 128);
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) block(ring, first + i);
  }

  // `is_last`: this warp has read the tile's Q for the last time.
  __device__ __forceinline__ void q(uint32_t tile, bool is_last) const {
    __syncwarp();
    pipe.q(consumer).arrive_empty_if(is_last && Own::lane() == 0, tile);
  }
};

}  // namespace flash::sm90
