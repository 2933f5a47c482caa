// Attention over a latent for cc 9.0: scores = scale (Q K^T + Qv V^T), O = softmax(scores) V, where
// V has up to 512 columns, and Q and K up to 64. The second product is optional.
//
// That is multi-head latent attention in its absorbed form: what is cached of a token is one latent
// (V) that all heads share, and a narrow key that carries positions (K). O of 64 rows by 512
// columns takes the registers of two warpgroups, so two consumers have the same rows, and half of
// the columns each. Blocks of keys they take in turn:
//
//   first consumer                          second consumer
//   S = scores of block j                   S = scores of block j - 1
//   softmax: S -> P(j), to shared memory
//   O += P(j) V(j)                          O += P(j) V(j)
//                                           softmax: S -> P(j - 1), to shared memory
//   O += P(j - 1) V(j - 1)                  O += P(j - 1) V(j - 1)
//
// so that one's softmax runs beside the other's products, and each score is computed once. The
// shift of softmax goes from hand to hand with P. What was measured: docs/kernels/latent.md.
// Sources: DeepSeek-V2 (arXiv:2405.04434) for the formula; the order of the two is that of
// FlashMLA's description.
#pragma once

#include "ptx/warpgroup.cuh"
#include "sm90/latent_consumer.cuh"
#include "sm90/latent_producer.cuh"

namespace flash::sm90 {

template <class Cfg>
__device__ inline void latent(const TmaLatentParams& params) {
  extern __shared__ __align__(1024) unsigned char storage[];
  ptx::let_kernel_behind_begin();
  const LatentPipeline<Cfg> pipe(storage);
  clear_unused_rows<Cfg>(params.all.call, pipe.q_buffer());
  constexpr int kLoaders = LatentPipeline<Cfg>::kLoaders;
  pipe.init(is_gathered(params.all.call.seqs) ? 32 * kLoaders : 1);
  if (threadIdx.x < 128) {
    ptx::give_registers<Cfg::kTile.registers_of_others()>();
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (warp < kLoaders) load_latent_blocks(params.all, pipe, warp, lane);
    if (warp == kLoaders && lane == 0) plan_latent_tiles(params, pipe);
    __syncwarp();
    // The other CTA may still have to say that it is done with a block, or to send a tile.
    pipe.meet();
  } else {
    ptx::take_registers<Cfg::kTile.registers_of_consumer()>();
    LatentConsumer<Cfg>(params.all, pipe).run();
  }
}

}  // namespace flash::sm90
