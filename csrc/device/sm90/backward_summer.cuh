// The consumer that multiplies dQ of all keys of a block, where others have dK and dV: it waits for
// dS of a step, and what it makes of it leaves by its sender.
#pragma once

#include "sm90/backward_consumer.cuh"

namespace flash::sm90 {

template <class Cfg>
class Summer : GradientConsumer<Cfg> {
  using Base = GradientConsumer<Cfg>;
  using T = typename Cfg::T;
  using TileK = typename Cfg::TileK;
  using TileDs = typename Cfg::TileDs;

 public:
  __device__ __forceinline__ Summer(const TmaBackwardParams& params,
                                    const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void run() {
    while (this->has_block()) {
      int left = ptx::uniform(num_steps(this->block()));
      if (left > 0) {
        this->pipe_.keys().wait_full(this->keys_);
        this->clean_keys();
        for (; left > 0; --left) step();
        this->release_keys(this->keys_);
        ++this->keys_;
      }
      this->close_block();
    }
  }

 private:
  __device__ __forceinline__ void step() {
    tile::Accumulators<1, Cfg::kHeadDim / 8> dq;
    this->pipe_.gradients().wait_full(this->step_);
    tile::start_ab<T, TileDs, TileK>(dq, this->pipe_.ds_buffer(this->step_),
                                     this->pipe_.k_buffer(this->keys_));
    ptx::wgmma_wait<0>();
    ptx::pin(dq.c[0]);
    this->pipe_.gradients().arrive_empty_if(this->lane() == 0, this->step_);
    const auto out = this->pipe_.outs(0);
    out.wait_empty(this->step_ + 1);  // what the step in front has put there has left
    tile::WarpgroupOrder::store(this->pipe_.out_buffer(0), dq, Cfg::kHeadDim, this->thread());
    ptx::fence_async_proxy();
    __syncwarp();
    out.arrive_full_if(this->lane() == 0, this->step_);
    ++this->step_;
  }
};

}  // namespace flash::sm90
