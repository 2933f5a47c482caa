// Forward attention for cc 9.0: O = softmax(scores(Q K^T)) V and its log-sum-exp.
//
// A CTA has a multiprocessor to itself and takes tile after tile. One
// warpgroup plans, loads and stores; two (at some head dims three or four) compute, 64 rows each:
//
//   for block j, descending:
//     S = Q K(j)^T                     asynchronous
//     O += P V(j + 1)                  asynchronous
//     softmax: S -> p                  as soon as S is there, beside the product with V
//     P = p; O is rescaled only where a maximum grew by much
//   O / sum -> shared memory -> TMA    beside the next tile
//
// Q stays in registers where it fits. Who waits for whom: pipeline.cuh. What bounds it, and what
// was measured: docs/kernels/sm90.md. Sources: FlashAttention-3 (arXiv:2407.08608).
#pragma once

#include "ptx/warpgroup.cuh"
#include "sm90/consumer.cuh"
#include "sm90/fp8_transpose.cuh"
#include "sm90/producer.cuh"

namespace flash::sm90 {

template <class Cfg>
__device__ inline void forward(const TmaForwardParams& params) {
  extern __shared__ __align__(1024) unsigned char storage[];
  ptx::let_kernel_behind_begin();
  const Pipeline<Cfg> pipe(storage);
  clear_unused_rows<Cfg>(params.call, pipe.q_buffer(0, 0));
  pipe.init();
  if (threadIdx.x < 128) {
    ptx::give_registers<Cfg::kTile.registers_of_others()>();
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (warp == 0) {
      load_tiles<Cfg>(params, pipe, lane);
      __syncwarp();
      // The other CTA may still have to say that it is done with a block.
      if constexpr (Cfg::kMayPair) pipe.meet();
    }
    if constexpr (Cfg::kIsFp8) {
      if (warp == 1) plan_and_store_tiles<Cfg>(params, pipe, lane);
      if (warp >= 2) transpose_values<Cfg>(pipe, warp - 2, lane);
    } else {
      if (warp == 1 && lane == 0) plan_tiles<Cfg>(params, pipe);
      if (warp >= 2) store_tiles<Cfg>(params, pipe, warp - 2, lane);
    }
  } else {
    ptx::take_registers<Cfg::kTile.registers_of_consumer()>();
    Consumer<Cfg>(params, pipe).run();
  }
}

}  // namespace flash::sm90
