// Consumers that share 64 keys, where dK and dV of more do not fit the registers of one: the first
// computes P and dV, the second dS and dK. P goes from one to the other as it is, in float. dQ has
// a kernel of its own (queries.cuh).
#pragma once

#include "sm90/backward_consumer.cuh"

namespace flash::sm90 {

// What both do.
template <class Cfg>
class SharingConsumer : public GradientConsumer<Cfg> {
 protected:
  using Base = GradientConsumer<Cfg>;
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  using AccS = typename Cfg::AccS;
  using Packed = uint32_t[4][4];  // 64 keys by 64 queries
  static_assert(Cfg::kBlockM == 64, "one product a step");

  __device__ __forceinline__ SharingConsumer(const TmaBackwardParams& params,
                                             const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void open_step() const {
    this->pipe_.queries().wait_full(this->step_);
    this->clean_queries();
  }

  // By V, dV leaves, and dK by K.
  __device__ __forceinline__ void store(const typename Cfg::AccKV& acc, float factor,
                                        const TensorMap& map, const Rows& to, int num_cols) const {
    this->put_out(acc, factor, to, 0, num_cols);
    this->barrier();
    if (this->thread() == 0 && leave_by_tma(this->params_, this->block(), this->block().first)) {
      send_rows<typename Cfg::TileOut>(map, this->out(), this->block(), this->block().first,
                                       num_cols);
    }
  }

  // Goes to the block's first step. False: it has none, and no keys.
  __device__ __forceinline__ bool open_keys() {
    const bool has_steps = this->has_steps();
    if (has_steps) this->pipe_.keys().wait_full(this->keys_);
    return has_steps;
  }

  // The buffers of K and V are free when dK and dV have left them.
  __device__ __forceinline__ void close_keys(bool had_steps) {
    if (this->thread() == 0) ptx::tma_store_wait_read();
    if (had_steps) {
      this->release_keys(this->keys_);
      this->release_values();
      ++this->keys_;
    }
    this->close_block();
  }

  // This thread's part of P, from consumer to consumer. There are two buffers, as there are of Q:
  // what a step writes was read two steps before, or Q would not be there.
  static_assert(Cfg::kStages == 2, "as many as of P");
  __device__ uint32_t p_of_thread() const {
    return this->pipe_.p_buffer(this->step_) + this->thread() * 16;
  }
  // A named barrier, of even or odd steps.
  __device__ int p_is_there() const { return 4 + this->step_ % 2; }

  __device__ uint32_t q() const { return this->pipe_.q_buffer(this->step_); }
  __device__ uint32_t dout() const { return this->pipe_.dout_buffer(this->step_); }
};

// P and dV.
template <class Cfg>
class ValuesConsumer : SharingConsumer<Cfg> {
  using Base = SharingConsumer<Cfg>;
  using typename Base::AccS;
  using typename Base::Packed;
  using typename Base::T;
  using typename Base::TileK;
  using typename Base::TileQ;

 public:
  __device__ __forceinline__ ValuesConsumer(const TmaBackwardParams& params,
                                            const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void run() {
    while (this->has_block()) {
      dv_.clear();
      const bool has_steps = this->open_keys();
      if (has_steps) {
        this->clean_keys(0, Cfg::kBlockN);
        this->find_bounds(0);
        if (attn::is_plain(this->params_.scores)) {
          run_steps<true>();
        } else {
          run_steps<false>();
        }
      }
      this->barrier_of_both();  // nobody needs V any more: dV leaves through it
      this->store(dv_, 1.0f, this->maps_.dv, this->params_.dv_grad, this->params_.dv);
      this->close_keys(has_steps);
    }
  }

 private:
  template <bool kPlain>
  __device__ __forceinline__ void run_steps() {
    do {
      this->open_step();
      step<kPlain>();
    } while (this->close_step());
  }

  template <bool kPlain>
  __device__ __forceinline__ void step() {
    AccS s;
    if (kPlain) begin_with(s, this->statistic(kLse, 0), this->maps_.lse_factor);
    tile::start_abt<T, Cfg::kHeadDim, TileK, TileQ>(s, this->pipe_.k_buffer(0), this->q(), kPlain);
    ptx::wgmma_wait<0>();
    ptx::pin(s.c[0]);
    Packed p;
    if constexpr (kPlain) {
      this->hide_unseen(s, this->warp_row(), 0);
      exponentiate(s, this->maps_.scale_log2);
      tile::pack<T>(p, s);
    } else {
      this->transform_scores(s, p, this->warp_row(), 0);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float(&x)[4] = s.c[0][n];
      ptx::st_shared_128(this->p_of_thread() + n * 2048,
                         make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]),
                                    __float_as_uint(x[2]), __float_as_uint(x[3])));
    }
    ptx::named_barrier_arrive(this->p_is_there(), Base::kBothConsumers);
    this->pipe_.douts().wait_full(this->step_);
    tile::start_pb<T, TileQ>(dv_, p, this->dout());
    ptx::wgmma_wait<0>();
    ptx::pin(dv_.c[0]);
    ptx::pin(p);
  }

  typename Cfg::AccKV dv_;
};

// dS and dK.
template <class Cfg>
class KeyGradientsConsumer : SharingConsumer<Cfg> {
  using Base = SharingConsumer<Cfg>;
  using typename Base::AccS;
  using typename Base::Packed;
  using typename Base::T;
  using typename Base::TileK;
  using typename Base::TileQ;

 public:
  __device__ __forceinline__ KeyGradientsConsumer(const TmaBackwardParams& params,
                                                  const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void run() {
    while (this->has_block()) {
      dk_.clear();
      const bool has_steps = this->open_keys();
      if (has_steps) {
        this->clean_keys(0, Cfg::kBlockN);
        do {
          this->open_step();
          step();
        } while (this->close_step());
      }
      this->barrier_of_both();  // nobody needs K any more: dK leaves through it
      this->store(dk_, this->params_.scores.softmax_scale, this->maps_.dk, this->params_.dk,
                  this->params_.d);
      this->close_keys(has_steps);
    }
  }

 private:
  __device__ __forceinline__ void step() {
    AccS dp;
    this->pipe_.douts().wait_full(this->step_);
    tile::start_abt<T, Cfg::kHeadDim, TileK, TileQ>(dp, this->pipe_.v_buffer(), this->dout());
    ptx::named_barrier_sync(this->p_is_there(), Base::kBothConsumers);
    ptx::wgmma_wait<0>();
    ptx::pin(dp.c[0]);
    AccS p;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint4 x = ptx::ld_shared_128(this->p_of_thread() + n * 2048);
      p.c[0][n][0] = __uint_as_float(x.x);
      p.c[0][n][1] = __uint_as_float(x.y);
      p.c[0][n][2] = __uint_as_float(x.z);
      p.c[0][n][3] = __uint_as_float(x.w);
    }
    Packed ds;
    add_to(dp, this->statistic(kMinusDelta, 0));
    gradients_of_scores<T>(ds, p, dp);
    tile::start_pb<T, TileQ>(dk_, ds, this->q());
    ptx::wgmma_wait<0>();
    ptx::pin(dk_.c[0]);
    ptx::pin(ds);
  }

  typename Cfg::AccKV dk_;
};

}  // namespace flash::sm90
