// A consumer that has 64 keys for itself: their P and dS never leave its registers as operands of
// dV and dK. Only dQ needs the dS of all keys, so that one goes through shared memory. It has a
// consumer (backward_summer.cuh); or these share out dQ's columns, or its rows. Then a step
// multiplies the dQ of the step before, of the same block of keys or not, for which the other
// consumer's dS has long been there.
#pragma once

#include "sm90/backward_consumer.cuh"

namespace flash::sm90 {

template <class Cfg>
class KeysConsumer : GradientConsumer<Cfg> {
  using Base = GradientConsumer<Cfg>;
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  using TileDs = typename Cfg::TileDs;
  using AccS = typename Cfg::AccS;
  using AccQ = tile::Accumulators<1, 8>;
  using Packed = uint32_t[4][4];          // 64 keys by 64 queries
  static constexpr int kRows = 64 * 128;  // bytes of 64 rows of a panel
  // The first of four named barriers: for each consumer those of even and odd steps.
  static constexpr int kDsIsThere = 4;
  // A step has 64 queries, and a consumer a panel of columns of their dQ; or 128, and it has 64.
  static constexpr bool kByRows = Cfg::kBlockM == 128;
  // A consumer's K stays in registers, where there is room: shared memory is read less.
  static constexpr bool kHoldsKeys = kByRows;
  static constexpr bool kMakesDq = !Cfg::kHasSummer;
  // A run of steps is a loop of its own, or all of them are one: whichever leaves registers for the
  // thread's index.
  static constexpr bool kJoinsRuns = kByRows;
  static_assert(kByRows ? Cfg::kHeadDim == 64 && kMakesDq
                        : Cfg::kBlockM == 64 && TileK::kCols == 128,
                "a consumer has 64 x 64 of dQ");

 public:
  __device__ __forceinline__ KeysConsumer(const TmaBackwardParams& params,
                                          const BackwardPipeline<Cfg>& pipe)
      : Base(params, pipe) {}

  __device__ __forceinline__ void run() {
    if constexpr (kMakesDq) announce_ds(0);
    while (this->has_block()) {
      dk_.clear();
      dv_.clear();
      const bool has_steps = this->has_steps();
      if (has_steps) {
        this->pipe_.keys().wait_full(this->keys_);
        if (attn::is_plain(this->params_.scores)) {
          run_steps<true>();
        } else {
          run_steps<false>();
        }
      }
      if (has_steps) {
        if constexpr (kMakesDq) {
          send_dv();
        } else {
          store(dv_, 1.0f, this->params_.dv_grad, this->params_.dv);
        }
        // From registers: dV may be on its way through the buffer.
        store(dk_, this->params_.scores.softmax_scale, this->params_.dk, this->params_.d);
        ++this->keys_;
      } else {
        this->store_zeros(64 * this->consumer_);
      }
      this->close_block();
    }
    if constexpr (kMakesDq) finish_late_dq();
  }

 private:
  template <bool kPlain>
  __device__ __forceinline__ void run_steps() {
    this->clean_keys(64 * this->consumer_, 64);
    if (!kPlain || !this->are_whole()) this->find_bounds(64 * this->consumer_);
    if constexpr (kHoldsKeys) {
      tile::load_a<TileK>(k_, this->pipe_.k_buffer(this->keys_),
                          64 * this->consumer_ + this->warp_row(), this->lane());
    }
    do {
      do {
        this->pipe_.queries().wait_full(this->step_);
        this->clean_queries();
        if constexpr (kByRows) {
          step_of_128<kPlain>();
        } else {
          step_of_64<kPlain>();
        }
        if constexpr (kMakesDq) {
          if (late_keys_ != this->keys_) this->release_keys(late_keys_);
          late_keys_ = this->keys_;
        }
        this->release_queries(this->step_);
      } while (this->next_of_run() || (kJoinsRuns && this->next_run()));
    } while (!kJoinsRuns && this->next_run());
    if constexpr (!kMakesDq) this->release_keys(this->keys_);
    this->release_values();
  }

  // The steps of scores that are not plain wait for S alone: what becomes of it takes registers.
  //
  // What is read from shared memory queues behind the additions to memory: so lse is read before
  // them, and delta late.
  template <bool kPlain>
  __device__ __forceinline__ void step_of_64() {
    AccS s, dp;
    AccQ dq;
    if (kPlain) begin_with(s, this->statistic(kLse, 0), this->maps_.lse_factor);
    if constexpr (kMakesDq) start_late_dq(dq);
    start_s(s, 0, kPlain);
    if constexpr (kMakesDq) {
      ptx::wgmma_wait<1>();
      put_late_dq(dq);
    }
    this->pipe_.douts().wait_full(this->step_);
    if (kPlain) start_dp(dp, 0);
    ptx::wgmma_wait<kPlain ? 1 : 0>();
    ptx::pin(s.c[0]);
    Packed p, ds;
    absorb<kPlain>(s, p, 0);
    if (!kPlain) start_dp(dp, 0);
    start_dv(p, 0);
    if constexpr (kMakesDq) send_late_dq();
    ptx::wgmma_wait<1>();
    ptx::pin(dp.c[0]);
    add_to(dp, this->statistic(kMinusDelta, 0));
    to_gradients(ds, s, dp, 0);
    announce_ds(this->step_ + 1);
    start_dk(ds, 0);
    ptx::wgmma_wait<0>();
    ptx::pin(dv_.c[0]);
    ptx::pin(p);
    ptx::pin(dk_.c[0]);
    ptx::pin(ds);
  }

  // Two halves, of which one is multiplied while the other becomes P and dS. Sums of dP begin with
  // -delta.
  template <bool kPlain>
  __device__ __forceinline__ void step_of_128() {
    AccS s0, dp0, s1, dp1;
    start_s(s0, 0);
    const ColumnPairs lse0 = this->statistic(kLse, 0);
    begin_with(dp0, this->statistic(kMinusDelta, 0));
    this->pipe_.douts().wait_full(this->step_);
    if (kPlain) start_dp(dp0, 0, true);
    AccQ dq;
    start_late_dq(dq);
    ptx::wgmma_wait<kPlain ? 2 : 1>();
    ptx::pin(s0.c[0]);
    Packed p0, ds0, p1, ds1;
    absorb<kPlain>(s0, p0, 0, lse0);
    if (!kPlain) start_dp(dp0, 0, true);
    start_dv(p0, 0);
    start_s(s1, 1);
    ptx::wgmma_wait<2>();
    ptx::pin(dp0.c[0]);
    put_late_dq(dq);
    const ColumnPairs lse1 = this->statistic(kLse, 1);
    begin_with(dp1, this->statistic(kMinusDelta, 1));
    to_gradients(ds0, s0, dp0, 0);
    send_late_dq();
    start_dp(dp1, 1, true);
    start_dk(ds0, 0);
    ptx::wgmma_wait<2>();
    ptx::pin(dv_.c[0]);
    ptx::pin(p0);
    ptx::pin(s1.c[0]);
    absorb<kPlain>(s1, p1, 1, lse1);
    start_dv(p1, 1);
    ptx::wgmma_wait<2>();
    ptx::pin(dp1.c[0]);
    to_gradients(ds1, s1, dp1, 1);
    announce_ds(this->step_ + 1);
    start_dk(ds1, 1);
    ptx::wgmma_wait<0>();
    ptx::pin(dv_.c[0]);
    ptx::pin(p1);
    ptx::pin(ds0);
    ptx::pin(dk_.c[0]);
    ptx::pin(ds1);
  }

  // The parts of a step, for its first or second 64 queries. `adds`: to what is there.
  __device__ __forceinline__ void start_s(AccS& s, int half, bool adds = false) {
    if constexpr (kHoldsKeys) {
      tile::start_abt<T, TileQ>(s, k_, q(half), adds);
    } else {
      tile::start_abt<T, Cfg::kHeadDim, TileK, TileQ>(
          s, this->pipe_.k_buffer(this->keys_) + this->consumer_ * kRows, q(half), adds);
    }
  }
  __device__ __forceinline__ void start_dp(AccS& dp, int half, bool adds = false) const {
    tile::start_abt<T, Cfg::kHeadDim, TileK, TileQ>(
        dp, this->pipe_.v_buffer() + this->consumer_ * kRows, dout(half), adds);
  }
  __device__ __forceinline__ void start_dv(Packed& p, int half) {
    tile::start_pb<T, TileQ>(dv_, p, dout(half));
  }
  __device__ __forceinline__ void start_dk(Packed& ds, int half) {
    tile::start_pb<T, TileQ>(dk_, ds, q(half));
  }
  // `lse`: where sums of S did not begin with it.
  template <bool kPlain, class... Lse>
  __device__ __forceinline__ void absorb(AccS& s, Packed& p, int half, const Lse&... lse) const {
    const int row = 64 * this->consumer_ + this->warp_row();
    if constexpr (kPlain) {
      this->hide_unseen(s, row, half);
      exponentiate(s, this->maps_.scale_log2, lse...);
      tile::pack<T>(p, s);
    } else {
      this->transform_scores(s, p, row, half);
    }
  }
  // To those of dQ too, as announce_ds() tells them. There are two buffers. The one that a step
  // writes was read in the step before by a consumer like this one.
  __device__ __forceinline__ void to_gradients(Packed& ds, const AccS& s, const AccS& dp,
                                               int half) const {
    gradients_of_scores<T>(ds, s, dp);
    if constexpr (!kMakesDq) this->pipe_.gradients().wait_empty(this->step_);
    tile::store_transposed<TileDs>(this->pipe_.ds_buffer(this->step_) + half * kRows, ds,
                                   64 * this->consumer_ + this->warp_row(), this->lane());
    ptx::fence_async_proxy();
  }

  // dS of the step before `step` is there, for the other consumer. In front of the first step too:
  // dQ is multiplied there as in any other, of whatever the buffer holds, and left.
  __device__ void announce_ds(uint32_t step) const {
    if constexpr (kMakesDq) {
      ptx::named_barrier_arrive(ds_is_there(this->consumer_ ^ 1, step), Base::kBothConsumers);
    } else {
      __syncwarp();
      this->pipe_.gradients().arrive_full_if(this->lane() == 0, step - 1);
    }
  }
  __device__ static int ds_is_there(int consumer, uint32_t step) {
    return kDsIsThere + consumer * 2 + step % 2;
  }

  // dQ of the step before.
  __device__ __forceinline__ void start_late_dq(AccQ& dq) const {
    ptx::named_barrier_sync(ds_is_there(this->consumer_, this->step_), Base::kBothConsumers);
    const uint32_t ds = this->pipe_.ds_buffer(this->step_ - 1);
    const uint32_t k = this->pipe_.k_buffer(late_keys_);
    if constexpr (kByRows) {
      tile::start_ab<T, TileDs, TileK>(dq, ds + this->consumer_ * kRows, k);
    } else {
      tile::start_ab<T, TileDs, TileK>(dq, ds, k + this->consumer_ * TileK::kPanelBytes);
    }
  }
  __device__ __forceinline__ void put_late_dq(AccQ& dq) const {
    ptx::pin(dq.c[0]);
    if (this->step_ == 0) return;
    // Only of the last panel are there columns that dQ does not have.
    const int num_columns =
        Cfg::kHeadDim % 64 == 0 || this->consumer_ == 0 ? 64 : Cfg::kHeadDim % 64;
    wait_for_out();
    tile::WarpgroupOrder::store(this->out(), dq, num_columns, this->thread());
  }
  // Some time behind put_late_dq(): its fence waits until all of that has got into shared memory,
  // which products keep busy.
  __device__ __forceinline__ void send_late_dq() const {
    if (this->step_ == 0) return;
    ptx::fence_async_proxy();
    send_out();
  }

  __device__ __forceinline__ void send_dv() const {
    wait_for_out();
    this->put_out(dv_, 1.0f, this->params_.dv_grad, 64 * this->consumer_, this->params_.dv);
    send_out();
  }
  // Before a step and behind a block's last one, as many have left: dQ of all steps but the last,
  // dV of all blocks.
  __device__ uint32_t num_sent() const { return this->step_ - 1 + this->keys_; }
  __device__ __forceinline__ void wait_for_out() const {
    this->pipe_.outs(this->consumer_).wait_empty(num_sent());
  }
  __device__ __forceinline__ void send_out() const {
    __syncwarp();
    this->pipe_.outs(this->consumer_).arrive_full_if(this->lane() == 0, num_sent());
  }

  __device__ __forceinline__ void store(const typename Cfg::AccK& acc, float factor, const Rows& to,
                                        int num_cols) const {
    this->store_rows(acc, factor, to, 64 * this->consumer_, num_cols);
  }

  __device__ __forceinline__ void finish_late_dq() const {
    AccQ dq;
    start_late_dq(dq);
    ptx::wgmma_wait<0>();
    put_late_dq(dq);
    send_late_dq();
  }

  __device__ uint32_t q(int half) const { return this->pipe_.q_buffer(this->step_) + half * kRows; }
  __device__ uint32_t dout(int half) const {
    return this->pipe_.dout_buffer(this->step_) + half * kRows;
  }

  typename Cfg::AccK dk_, dv_;
  uint32_t late_keys_ = 0;             // the block of keys of the step before
  uint32_t k_[Cfg::kHeadDim / 16][4];  // where it is held
};

}  // namespace flash::sm90
