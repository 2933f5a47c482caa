// dQ, above head dim 128: there a CTA of the backward kernel has 64 keys, and sums of dQ in memory
// would take longer than S and dP a second time.
//
//   for each block of keys:
//     S = Q K^T; dP = dO V^T        asynchronous, behind dQ of the block before
//     P = 2^(...)                   as soon as S is there
//     dS = P (dP - delta)           once dP is there; it stays in registers
//     dQ += dS K
//
// One warpgroup plans and loads; two compute, 64 queries each. They have nothing to tell each
// other. The kernel of dK and dV is still at work when this one begins, on multiprocessors that
// have no more blocks of keys: all that is needed of it is that its CTAs run, since by then delta
// is there.
#pragma once

#include "sm90/backward_scores.cuh"
#include "sm90/own.cuh"
#include "sm90/queries_pipeline.cuh"
#include "tile/warpgroup.cuh"

namespace flash::sm90 {

// Keys that a query sees, from a lane's first one on: [begin, end).
struct SeenKeys {
  int begin[2], end[2];

  __device__ SeenKeys(const attn::Mask& mask, int row, int col) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      begin[h] = mask.lowest(row + 8 * h) - col;
      end[h] = mask.highest(row + 8 * h) - col;
    }
  }
};

// The counterpart of transform() for queries as rows. `distance`: from the key of this lane's first
// entry to its query.
template <int kN>
__device__ __forceinline__ void weigh(tile::Accumulators<1, kN>& s, const attn::ScoreRule& rule,
                                      const SeenKeys& seen, int distance, const float (&lse)[2]) {
  const bool caps = rule.softcap > 0.0f;
  const float factor = caps ? __fdividef(rule.scale, rule.softcap) : rule.scale;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i / 2;
      const int col = 8 * n + i % 2;
      float x = s.c[0][n][i] * factor;
      float slope = 1.0f;
      if (caps) {
        const float t = attn::tanh(x);
        slope = 1.0f - t * t;
        x = rule.softcap * t;
      }
      x -= rule.slope * static_cast<float>(abs(distance + 8 * h - col));
      const bool is_seen = col >= seen.begin[h] && col < seen.end[h];
      s.c[0][n][i] = is_seen ? ptx::ex2(x * attn::kLog2e - lse[h]) * slope : 0.0f;
    }
  }
}

template <class Cfg>
class QueriesConsumer {
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  using AccS = typename Cfg::AccS;
  static constexpr int kBlockN = Cfg::kBlockN;

 public:
  __device__ __forceinline__ QueriesConsumer(const TmaBackwardParams& params,
                                             const QueriesPipeline<Cfg>& pipe)
      : maps_(params),
        params_(params.call),
        pipe_(pipe),
        consumer_(ptx::uniform(threadIdx.x / 128) - 1) {}

  __device__ __forceinline__ void run() {
    while (has_block()) {
      dq_.clear();
      if (has_steps()) {
        if (attn::is_plain(params_.scores)) {
          run_steps<true>();
        } else {
          run_steps<false>();
        }
      }
      pass_steps();
      store();
      barrier();  // no warp needs the block's record any more
      pipe_.blocks().arrive_empty_if(Own::thread() == 0, block_);
      ++block_;
    }
  }

 private:
  // Waits for the next block of queries; false where there is none.
  __device__ __forceinline__ bool has_block() const {
    __syncwarp();
    pipe_.blocks().wait_full(block_);
    return ptx::uniform(block().is_last) == 0;
  }

  __device__ __forceinline__ bool has_steps() {
    const QueryBlock& b = block();
    at_ = ptx::uniform(b.begin);
    end_ = ptx::uniform(b.end_of[consumer_]);
    full_begin_ = ptx::uniform(b.full_begin[consumer_]);
    full_end_ = ptx::uniform(b.full_end[consumer_]);
    dirty_ = ptx::uniform(b.tail_k > 0 ? b.sk / kBlockN : -1);
    return at_ < end_;
  }

  template <bool kPlain>
  __device__ __forceinline__ void run_steps() {
    read_statistics();
    first_step<kPlain>();
    while (at_ < end_) step<kPlain>();
    last_step();
  }

  // From S and dP of a block to dS, while dQ of the one before is multiplied. Nothing is under way
  // between two steps: the compiler would wait for it.
  template <bool kPlain>
  __device__ __forceinline__ void first_step() {
    AccS s, dp;
    pipe_.q(consumer_).wait_full(round_);
    clean_keys();
    start_s(s);
    pipe_.dout(consumer_).wait_full(round_);
    start_dp(dp);
    ptx::wgmma_wait<kPlain ? 1 : 0>();
    to_gradients<kPlain>(s, dp);
  }
  template <bool kPlain>
  __device__ __forceinline__ void step() {
    AccS s, dp;
    clean_keys();
    start_dq();
    start_s(s);
    start_dp(dp);
    ptx::wgmma_wait<kPlain ? 1 : 0>();
    finish_dq();
    to_gradients<kPlain>(s, dp);
  }
  __device__ __forceinline__ void last_step() {
    start_dq();
    ptx::wgmma_wait<0>();
    finish_dq();
  }

  __device__ __forceinline__ void start_s(AccS& s) const {
    pipe_.k().wait_full(step_);
    tile::start_abt<T, Cfg::kHeadDim, TileQ, TileK>(s, pipe_.q_buffer(consumer_),
                                                    pipe_.k_buffer(step_));
  }
  // Its sums begin with -delta: what they end with is dP - delta.
  __device__ __forceinline__ void start_dp(AccS& dp) const {
    const float from[1][2] = {{minus_delta_[0], minus_delta_[1]}};
    dp.fill_rows(from);
    pipe_.v().wait_full(step_);
    tile::start_abt<T, Cfg::kValueDim, TileQ, TileK>(dp, pipe_.dout_buffer(consumer_),
                                                     pipe_.v_buffer(step_), true);
  }
  // Of the step before.
  __device__ __forceinline__ void start_dq() {
    tile::start_pb<T, TileK>(dq_, ds_, pipe_.k_buffer(step_ - 1));
  }
  __device__ __forceinline__ void finish_dq() {
    ptx::pin(dq_.c[0]);
    ptx::pin(ds_);
    pipe_.k().arrive_empty_if(Own::thread() == 0, step_ - 1);
  }

  // S is there, dP will be.
  template <bool kPlain>
  __device__ __forceinline__ void to_gradients(AccS& s, AccS& dp) {
    const bool is_last = at_ + 1 == end_;
    ptx::pin(s.c[0]);
    pipe_.q(consumer_).arrive_empty_if(is_last && Own::thread() == 0, round_);
    absorb<kPlain>(s);
    ptx::wgmma_wait<0>();
    ptx::pin(dp.c[0]);
    pipe_.v().arrive_empty_if(Own::thread() == 0, step_);
    pipe_.dout(consumer_).arrive_empty_if(is_last && Own::thread() == 0, round_);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s.c[0][n][i] *= dp.c[0][n][i];
    }
    tile::pack<T>(ds_, s);
    ++step_;
    ++at_;
  }

  // S becomes P, or what dP - delta is multiplied by.
  template <bool kPlain>
  __device__ __forceinline__ void absorb(AccS& s) const {
    const QueryBlock& b = block();
    const attn::Mask mask(params_.scores, b.sq, b.sk);
    const int row = b.first + kBoxM * consumer_ + Own::warp_row() + Own::lane() / 4;
    const int col = at_ * kBlockN + Own::lane() % 4 * 2;
    if constexpr (kPlain) {
      if (__builtin_expect(at_ < full_begin_ || at_ >= full_end_, 0)) {
        attn::hide(s, mask, row, col);
      }
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s.c[0][n][i] = ptx::ex2(s.c[0][n][i] * maps_.scale_log2 - lse_[i / 2]);
        }
      }
    } else {
      const attn::ScoreRule rule(params_.scores, b.sequence, b.head);
      weigh(s, rule, SeenKeys(mask, row, col), row + mask.diagonal - col, lse_);
    }
  }

  // Lse in base 2 and -delta of this lane's two rows.
  __device__ __forceinline__ void read_statistics() {
    const QueryBlock& b = block();
    const float* tile =
        params_.statistics +
        2 * (attn::PaddedRows(params_, b.sequence, b.head, params_.statistics_head).first +
             b.first + kBoxM * consumer_);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = Own::warp_row() + Own::lane() / 4 + 8 * h;
      lse_[h] = tile[row];
      minus_delta_[h] = tile[kBoxM + row];
    }
  }

  // Rows of keys and values behind the sequence become zeros: they meet zeros in products, but may
  // hold infinities. Both consumers do it, so that neither waits for the other.
  __device__ __forceinline__ void clean_keys() const {
    if (__builtin_expect(at_ != dirty_, 1)) return;
    pipe_.k().wait_full(step_);
    pipe_.v().wait_full(step_);
    constexpr int kChunks = TileK::kCols / tile::kChunk;
    const int tail = ptx::uniform(block().tail_k);
#pragma unroll 1
    for (int at = tail * kChunks + Own::thread(); at < kBlockN * kChunks; at += 128) {
      const uint32_t offset = TileK::offset(at / kChunks, at % kChunks);
      ptx::st_shared_128(pipe_.k_buffer(step_) + offset, make_uint4(0, 0, 0, 0));
      ptx::st_shared_128(pipe_.v_buffer(step_) + offset, make_uint4(0, 0, 0, 0));
    }
    ptx::fence_async_proxy();
    barrier();
  }

  // Gives back what has been loaded for the other consumer alone, when all warps have seen it come:
  // no product keeps them together.
  __device__ __forceinline__ void pass_steps() {
    const int begin = ptx::uniform(block().begin);
    const int end = ptx::uniform(block().end);
    if (begin >= end) return;
    if (begin >= end_) {
      pipe_.q(consumer_).wait_full(round_);
      pipe_.dout(consumer_).wait_full(round_);
      barrier();
      pipe_.q(consumer_).arrive_empty_if(Own::thread() == 0, round_);
      pipe_.dout(consumer_).arrive_empty_if(Own::thread() == 0, round_);
    }
    for (; at_ < end; ++at_, ++step_) {
      pipe_.k().wait_full(step_);
      pipe_.v().wait_full(step_);
      barrier();
      pipe_.k().arrive_empty_if(Own::thread() == 0, step_);
      pipe_.v().arrive_empty_if(Own::thread() == 0, step_);
    }
    ++round_;
  }

  __device__ __forceinline__ void store() const {
    const QueryBlock& b = block();
    const int row = b.first + kBoxM * consumer_ + Own::warp_row();
    uint16_t* const to = static_cast<uint16_t*>(params_.dq.ptr) + b.batch_q * params_.dq.batch +
                         b.head * params_.dq.head + (int64_t{b.first_q} + row) * params_.dq.row;
    const float factor = params_.scores.softmax_scale;
    const float factors[2] = {factor, factor};
    tile::store_rows<T>(to, params_.dq.row, dq_, factors, b.sq - row, params_.d, Own::lane());
  }

  __device__ const QueryBlock& block() const { return pipe_.block(block_); }
  __device__ void barrier() const { ptx::named_barrier_sync(1 + consumer_, 128); }

  const TmaBackwardParams& maps_;
  const BackwardParams& params_;
  const QueriesPipeline<Cfg>& pipe_;
  // The rest is the same for all lanes of a warp, as the compiler knows.
  const int consumer_;
  uint32_t block_ = 0;  // of queries, counted from the start
  uint32_t round_ = 0;  // of these, those that have steps
  uint32_t step_ = 0;   // counted from the start
  // Of the block of queries: the block of keys of the step, and the one behind this consumer's
  // last; which ones all its queries see; which one ends with rows of others.
  int at_, end_;
  int full_begin_, full_end_;
  int dirty_;

  float lse_[2], minus_delta_[2];
  uint32_t ds_[kBlockN / 16][4];
  typename Cfg::AccQ dq_;
};

template <class Cfg>
__device__ inline void query_gradients(const TmaBackwardParams& params) {
  extern __shared__ __align__(1024) unsigned char storage[];
  const QueriesPipeline<Cfg> pipe(storage);
  pipe.init();
  if (ptx::uniform(threadIdx.x / 128) == 0) {
    ptx::give_registers<Cfg::kTile.registers_of_others()>();
    if (threadIdx.x == 0) load_key_steps<Cfg>(params, pipe);
    if (threadIdx.x == 32) {
      plan_query_blocks<Cfg>(params.call, pipe);
      // All of that kernel's CTAs run by now; this one ends behind it.
      if (blockIdx.x == gridDim.x - 1) ptx::wait_for_kernel_in_front();
    }
  } else {
    ptx::take_registers<Cfg::kTile.registers_of_consumer()>();
    QueriesConsumer<Cfg>(params, pipe).run();
  }
}

}  // namespace flash::sm90
