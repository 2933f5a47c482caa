// Consumers that share 64 keys, where dK and dV of more do not fit the registers of one: the first
// computes P and dV, the second dS and dK. P goes from one to the other as it is, in float. dQ has
// a kernel of its own (queries.cuh).
//
// Where there are buffers of three steps, dV and dK of a step are multiplied beside S and dP of the
// next one, and K and V stay in registers: those of the next block come into their buffers at once.
#pragma once

#include "sm90/backward_consumer.cuh"

namespace flash::sm90 {

// What both do. `kDepth`: columns of K or of V, of which its scores are made.
template <class Cfg, int kDepth>
class SharingConsumer : public GradientConsumer<Cfg> {
 protected:
  using Base = GradientConsumer<Cfg>;
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  using AccS = typename Cfg::AccS;
  using Packed = uint32_t[4][4];  // 64 keys by 64 queries
  static_assert(Cfg::kBlockM == 64, "one product a step");
  static constexpr bool kIsLate = Cfg::kTile.is_late();
  static_assert(kIsLate || Cfg::kStages == 2, "buffers of a step late, or of none");

  __device__ __forceinline__ SharingConsumer(const TmaBackwardParams& params,
                                             const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void open_step() const {
    this->pipe_.queries().wait_full(this->step_);
    this->clean_queries();
  }

  // By V, dV leaves, and dK by K, when nobody needs these any more; or both from registers.
  template <class Acc>
  __device__ __forceinline__ void store(const Acc& acc, float factor, const TensorMap& map,
                                        const Rows& to, int num_cols) const {
    if constexpr (kIsLate) {
      this->store_rows(acc, factor, to, 0, num_cols);
    } else {
      const int first = this->block().first;
      this->barrier_of_both();
      this->put_out(acc, factor, to, 0, num_cols);
      this->barrier();
      if (this->thread() == 0 && leave_by_tma(this->params_, this->block(), first)) {
        send_rows<typename Cfg::TileOut>(map, this->out(), this->block(), first, num_cols);
      }
    }
  }

  // Goes to the block's first step. False: it has none, and no keys.
  __device__ __forceinline__ bool open_keys() {
    const bool has_steps = this->has_steps();
    if (has_steps) this->pipe_.keys().wait_full(this->keys_);
    return has_steps;
  }

  // The buffers of K and V are free when dK and dV have left them, if these do.
  __device__ __forceinline__ void close_keys(bool had_steps) {
    if constexpr (!kIsLate) {
      if (this->thread() == 0) ptx::tma_store_wait_read();
      if (had_steps) release_both();
    }
    this->keys_ += had_steps;
    this->close_block();
  }

  // This thread's part of P, from consumer to consumer. There are two buffers.
  __device__ uint32_t p_of_thread() const {
    return this->pipe_.p_buffer(this->step_) + this->thread() * 16;
  }
  // Named barriers, of even or odd steps. What a step writes was read two steps before, or Q would
  // not be there, if there are only two buffers of it. Else the reader tells.
  __device__ int p_is_there() const { return 4 + this->step_ % 2; }
  __device__ static int p_is_free(uint32_t step) { return 6 + step % 2; }

  // K or V of all products to come. Who gives back a buffer must have seen it full.
  __device__ __forceinline__ void hold(uint32_t keys) {
    this->pipe_.douts().wait_full(this->step_);  // with the first, V comes
    tile::load_a<TileK>(held_, keys, this->warp_row(), this->lane());
    release_both();
  }
  // s += K Q^T, or V dO^T.
  __device__ __forceinline__ void start_scores(AccS& s, uint32_t keys, uint32_t queries,
                                               bool adds) {
    if constexpr (kIsLate) {
      tile::start_abt<T, TileQ>(s, held_, queries, adds);
    } else {
      tile::start_abt<T, kDepth, TileK, TileQ>(s, keys, queries, adds);
    }
  }
  // Ends the product of dV or dK of `step`: `operand` was in registers.
  template <class Acc>
  __device__ __forceinline__ void finish_product(Acc& sums, Packed& operand, uint32_t step) const {
    ptx::wgmma_wait<0>();
    ptx::pin(sums.c[0]);
    ptx::pin(operand);
    this->release_queries(step);
  }

 private:
  __device__ __forceinline__ void release_both() const {
    this->release_keys(this->keys_);
    this->release_values();
  }

  uint32_t held_[kDepth / 16][4];
};

// P and dV.
template <class Cfg>
class ValuesConsumer : SharingConsumer<Cfg, Cfg::kHeadDim> {
  using Base = SharingConsumer<Cfg, Cfg::kHeadDim>;
  using typename Base::AccS;
  using typename Base::Packed;
  using typename Base::T;
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
      this->store(dv_, 1.0f, this->maps_.dv, this->params_.dv_grad, this->params_.dv);
      this->close_keys(has_steps);
    }
    for (int i = 0; kIsLate && i < 2; ++i) {
      ptx::named_barrier_sync(Base::p_is_free(i), Base::kBothConsumers);
    }
  }

 private:
  static constexpr bool kIsLate = Base::kIsLate;

  template <bool kPlain>
  __device__ __forceinline__ void run_steps() {
    if constexpr (kIsLate) {
      this->hold(this->pipe_.k_buffer(0));
      this->open_step();
      step<kPlain, false>();
      while (this->next_step()) {
        this->open_step();
        step<kPlain, true>();
      }
      start_dv(this->step_ - 1);
      this->finish_product(dv_, p_, this->step_ - 1);
    } else {
      do {
        this->open_step();
        step<kPlain, false>();
        start_dv(this->step_);
        this->finish_product(dv_, p_, this->step_);
      } while (this->next_step());
    }
  }

  // Up to P. `kHasLate`: dV of the step before is multiplied beside it.
  template <bool kPlain, bool kHasLate>
  __device__ __forceinline__ void step() {
    const uint32_t late = this->step_ - 1;
    AccS s;
    if (kPlain) begin_with(s, this->statistic(kLse, 0), this->maps_.lse_factor);
    this->start_scores(s, this->pipe_.k_buffer(0), this->pipe_.q_buffer(this->step_), kPlain);
    if constexpr (kHasLate) start_dv(late);
    if constexpr (kPlain) {
      ptx::wgmma_wait<kHasLate ? 1 : 0>();
      ptx::pin(s.c[0]);
      this->hide_unseen(s, this->warp_row(), 0);
      exponentiate(s, this->maps_.scale_log2);
      if constexpr (!kHasLate) tile::pack<T>(p_, s);
    } else {
      ptx::wgmma_wait<0>();
      ptx::pin(s.c[0]);
      if constexpr (kHasLate) this->finish_product(dv_, p_, late);
      this->transform_scores(s, p_, this->warp_row(), 0);
    }
    if constexpr (kIsLate) {
      ptx::named_barrier_sync(Base::p_is_free(this->step_), Base::kBothConsumers);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float (&x)[4] = s.c[0][n];
      ptx::st_shared_128(this->p_of_thread() + n * 2048,
                         make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]),
                                    __float_as_uint(x[2]), __float_as_uint(x[3])));
    }
    ptx::named_barrier_arrive(this->p_is_there(), Base::kBothConsumers);
    if constexpr (kPlain && kHasLate) {
      this->finish_product(dv_, p_, late);
      tile::pack<T>(p_, s);
    }
  }

  __device__ __forceinline__ void start_dv(uint32_t step) {
    this->pipe_.douts().wait_full(step);
    tile::start_pb<T, TileQ>(dv_, p_, this->pipe_.dout_buffer(step));
  }

  Packed p_;
  typename Cfg::AccV dv_;
};

// dS and dK.
template <class Cfg>
class KeyGradientsConsumer : SharingConsumer<Cfg, Cfg::kValueDim> {
  using Base = SharingConsumer<Cfg, Cfg::kValueDim>;
  using typename Base::AccS;
  using typename Base::Packed;
  using typename Base::T;
  using typename Base::TileQ;

 public:
  __device__ __forceinline__ KeyGradientsConsumer(const TmaBackwardParams& params,
                                                  const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void run() {
    for (int i = 0; kIsLate && i < 2; ++i) {
      ptx::named_barrier_arrive(Base::p_is_free(i), Base::kBothConsumers);
    }
    while (this->has_block()) {
      dk_.clear();
      const bool has_steps = this->open_keys();
      if (has_steps) {
        this->clean_keys(0, Cfg::kBlockN);
        run_steps();
      }
      this->store(dk_, this->params_.scores.softmax_scale, this->maps_.dk, this->params_.dk,
                  this->params_.d);
      this->close_keys(has_steps);
    }
  }

 private:
  static constexpr bool kIsLate = Base::kIsLate;

  __device__ __forceinline__ void run_steps() {
    if constexpr (kIsLate) {
      this->hold(this->pipe_.v_buffer());
      this->open_step();
      step<false>();
      while (this->next_step()) {
        this->open_step();
        step<true>();
      }
      start_dk(this->step_ - 1);
      this->finish_product(dk_, ds_, this->step_ - 1);
    } else {
      do {
        this->open_step();
        step<false>();
        start_dk(this->step_);
        this->finish_product(dk_, ds_, this->step_);
      } while (this->next_step());
    }
  }

  // Up to dS.
  template <bool kHasLate>
  __device__ __forceinline__ void step() {
    AccS dp;
    this->pipe_.douts().wait_full(this->step_);
    this->start_scores(dp, this->pipe_.v_buffer(), this->pipe_.dout_buffer(this->step_), false);
    if constexpr (kHasLate) start_dk(this->step_ - 1);
    ptx::named_barrier_sync(this->p_is_there(), Base::kBothConsumers);
    ptx::wgmma_wait<kHasLate ? 1 : 0>();
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
    if constexpr (kIsLate) {
      ptx::named_barrier_arrive(Base::p_is_free(this->step_), Base::kBothConsumers);
    }
    add_to(dp, this->statistic(kMinusDelta, 0));
    if constexpr (kHasLate) this->finish_product(dk_, ds_, this->step_ - 1);
    gradients_of_scores<T>(ds_, p, dp);
  }

  __device__ __forceinline__ void start_dk(uint32_t step) {
    tile::start_pb<T, TileQ>(dk_, ds_, this->pipe_.q_buffer(step));
  }

  Packed ds_;
  typename Cfg::AccK dk_;
};

}  // namespace flash::sm90
