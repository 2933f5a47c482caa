// The consumer that multiplies dQ of all keys of a block, where others have dK and dV: it waits for
// dS of a step, and what it makes of it leaves by its sender, a panel of 64 columns at a time.
#pragma once

#include "sm90/backward_consumer.cuh"

namespace flash::sm90 {

template <class Cfg>
class SumsConsumer : GradientConsumer<Cfg> {
  using Base = GradientConsumer<Cfg>;
  using T = typename Cfg::T;
  using TileK = typename Cfg::TileK;
  using TileDs = typename Cfg::TileDs;
  static constexpr int kHeadDim = Cfg::kHeadDim;

 public:
  __device__ __forceinline__ SumsConsumer(const TmaBackwardParams& params,
                                          const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void run() {
    while (this->has_block()) {
      int left = num_steps();
      if (left > 0) {
        this->pipe_.keys().wait_full(this->keys_);
        this->clean_keys_alone();
        for (; left > 0; --left) step();
        this->release_keys(this->keys_);
        ++this->keys_;
      }
      this->close_block();
    }
  }

 private:
  __device__ __forceinline__ int num_steps() const {
    const int blocks = ptx::uniform(this->block().end) - ptx::uniform(this->block().begin);
    return blocks * (this->params_.hq / this->params_.hk);
  }

  __device__ __forceinline__ void step() {
    this->pipe_.gradients().wait_full(this->step_);
    tile::Accumulators<1, kHeadDim / 8> dq;
    tile::start_ab<T, TileDs, TileK>(dq, this->pipe_.ds_buffer(this->step_),
                                     this->pipe_.k_buffer(this->keys_));
    ptx::wgmma_wait<0>();
    ptx::pin(dq.c[0]);
    this->pipe_.gradients().arrive_empty_if(this->lane() == 0, this->step_);
    ++this->step_;
    put<0, 8>(dq);
    put<8, kHeadDim / 8>(dq);
  }

  // Columns 8 kBegin to 8 kEnd.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void put(const tile::Accumulators<1, kHeadDim / 8>& dq) {
    this->pipe_.outs(0).wait_empty(sent_);
    const uint32_t to = this->pipe_.out_buffer(sent_) + 16 * this->thread();
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) {
      const float(&x)[4] = dq.c[0][n];
      ptx::st_shared_128(to + (n - kBegin) * tile::WarpgroupOrder::kEightColumns * 4,
                         make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]),
                                    __float_as_uint(x[2]), __float_as_uint(x[3])));
    }
    ptx::fence_async_proxy();
    __syncwarp();
    this->pipe_.outs(0).arrive_full_if(this->lane() == 0, sent_);
    ++sent_;
  }

  uint32_t sent_ = 0;  // panels
};

}  // namespace flash::sm90
