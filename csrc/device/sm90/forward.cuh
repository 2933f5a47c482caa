// Forward attention for cc 9.0: O = softmax(scores(Q K^T)) V and its log-sum-exp.
#pragma once

#include "ptx/warpgroup.cuh"
#include "sm90/consumer.cuh"

namespace flash::sm90 {

template <class Cfg>
__device__ inline void forward(const TmaForwardParams& params) {
  extern __shared__ __align__(1024) unsigned char storage[];
  const Pipeline<Cfg> pipe(storage);
  pipe.init();
  if (threadIdx.x < 128) {
    ptx::give_registers<40>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) load_tiles<Cfg>(params, pipe);
    if (warp == 1) plan_tiles<Cfg>(params.call, pipe);
    if (warp >= 2) store_tiles<Cfg>(params, pipe, warp - 2);
  } else {
    ptx::take_registers<232>();
    Consumer<Cfg>(params.call, pipe).run();
  }
}

}  // namespace flash::sm90
