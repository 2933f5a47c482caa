// Backward attention for cc 9.0: dK and dV of blocks of keys, and their shares of dQ.
//
//   P = 2^(scores log2e - lse log2e)    dV = P^T dO     dP = dO V^T
//   dS = P (dP - delta)                 dK = dS^T Q     dQ = dS K      (dK and dQ times scale)
//
// A CTA has a multiprocessor to itself and a block of keys, whose K and V stay in shared memory and
// whose dK and dV in registers. It walks over the blocks of queries of the group's heads. One
// warpgroup plans and loads; two warpgroups compute, on the transposes of S and dP:
//
//   for each block of queries:
//     S = K Q^T; dP = V dO^T            asynchronous
//     P = 2^(...)                       as soon as S is there
//     dV += P^T dO                      beside the next line
//     dS = P (dP - delta)               once dP is there; through shared memory
//     dK += dS^T Q; dQ = dS K           dQ goes to memory beside another product
//
// Up to head dim 128 a consumer has half of the keys, and dQ is multiplied a step later
// (backward_by_keys.cuh) or by a third consumer (backward_summer.cuh); above that it has dV or dK
// (backward_by_gradients.cuh), and dQ has a kernel of its own (queries.cuh). Who waits for whom:
// backward_pipeline.cuh. What bounds it, and what was measured: docs/kernels/sm90_backward.md.
// Sources: FlashAttention-3 (arXiv:2407.08608).
#pragma once

#include "sm90/backward_by_gradients.cuh"
#include "sm90/backward_by_keys.cuh"
#include "sm90/backward_producer.cuh"
#include "sm90/backward_sender.cuh"
#include "sm90/backward_summer.cuh"

namespace flash::sm90 {

template <class Cfg>
__device__ inline void backward(const TmaBackwardParams& params) {
  extern __shared__ __align__(1024) unsigned char storage[];
  const BackwardPipeline<Cfg> pipe(storage);
  pipe.init();
  const int warpgroup = ptx::uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    ptx::give_registers<Cfg::kTile.registers_of_others()>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) load_steps<Cfg>(params, pipe);
    if (warp == 3) plan_blocks<Cfg>(params, pipe);
    if constexpr (Cfg::kByKeys) {
      if (warp >= 1 && warp <= Cfg::kSenders) Sender<Cfg>{params, pipe, warp - 1}.run();
    }
  } else if (Cfg::kHasSummer && warpgroup == 3) {
    ptx::give_registers<Cfg::kTile.registers_of_summer()>();
    if constexpr (Cfg::kHasSummer) Summer<Cfg>(params, pipe).run();
  } else {
    ptx::take_registers<Cfg::kTile.registers_of_consumer()>();
    if constexpr (Cfg::kByKeys) {
      KeysConsumer<Cfg>(params, pipe).run();
    } else if (warpgroup == 1) {
      ValuesConsumer<Cfg>(params, pipe).run();
    } else {
      KeyGradientsConsumer<Cfg>(params, pipe).run();
    }
  }
}

// What common/convert_dq.cuh must know: a CTA takes a tile of the sums that backward() made.
template <class T_, int kHeadDim_>
struct ConvertConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kSumRows;
  // Who counts when a block of keys has been added.
  static constexpr int kCounts = backward_tile(kHeadDim_).senders();
  static constexpr int kThreads = kConvertThreads;
  using TileQ = tile::SmemTile<kBlockM, kHeadDim>;
  using AccQ = tile::Accumulators<1, kHeadDim / 8>;
  using OrderQ = tile::WarpgroupOrder;

  __device__ static int q_row(int thread) { return thread / 32 * 16; }
  __device__ static int q_col(int) { return 0; }
};

}  // namespace flash::sm90
