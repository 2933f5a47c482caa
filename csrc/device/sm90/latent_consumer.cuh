// One of the two warpgroups that compute attention over a latent: all 64 rows of a tile, and half
// of the columns of O.
#pragma once

#include "sm90/latent_producer.cuh"
#include "sm90/sight.cuh"
#include "sm90/softmax.cuh"
#include "sm90/transform.cuh"
#include "tile/store.cuh"
#include "tile/warpgroup.cuh"

namespace flash::sm90 {

template <class Cfg>
class LatentConsumer {
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileKV = typename Cfg::TileKV;
  using TileP = typename Cfg::TileP;
  using AccS = typename Cfg::AccS;
  using Sight = SightOf<Cfg::kBlockN>;
  static constexpr int kThreads = 128;
  static constexpr int kColumns = Cfg::kValueDim / 2;  // of O
  static constexpr int kHalf = kColumns / 64;          // panels

 public:
  __device__ __forceinline__ LatentConsumer(const TmaForwardParams& params,
                                            const LatentPipeline<Cfg>& pipe)
      : params_(params.call),
        scale_log2_(params.scale_log2),
        pipe_(pipe),
        consumer_(ptx::uniform(threadIdx.x / kThreads - 1)),
        gathers_(is_gathered(params.call.seqs)) {}

  __device__ __forceinline__ void run() {
    // Else ptxas 12.8 makes products wait for each other.
    o_.clear();
    for (;; ++tile_) {
      pipe_.tiles().wait_full(tile_);
      const auto& t = pipe_.tile(tile_);
      if (t.end == 0) break;
      pipe_.q().wait_full(tile_);
      hold_q();
      softmax_.clear();
      is_fresh_ = true;
      if (consumer_ == 0) {
        for (int left = t.end - t.begin; left > 0; left -= 2) even_step(t.begin + left - 1, left);
      } else {
        for (int left = t.end - t.begin; left > 0; left -= 2) odd_step(t.begin + left - 2, left);
      }
      finish();
    }
  }

 private:
  // Some of Q goes to registers: so shared memory is read less for scores.
  __device__ __forceinline__ void hold_q() {
#pragma unroll
    for (int i = 0; i < Cfg::kHeldPanels; ++i) {
      tile::load_a<TileQ>(q_[i], pipe_.q_buffer() + i * TileQ::kPanelBytes, Own::warp_row(),
                          Own::lane());
    }
  }

  // The first consumer's part of two blocks, or of the last one: its scores are those of the first
  // block, `key_block`.
  __device__ __forceinline__ void even_step(int key_block, int left) {
    AccS s;
    clear_tail(key_block);
    start_scores(s, block_);
    const Sight sight = look(key_block);
    wait_for_scores(s, left <= 2);
    if (left > 1) ptx::named_barrier_arrive(kTurn, 2 * kThreads);
    absorb(s, sight, key_block);
    tile::pack<T>(p_, s);
    tell(kFromEven);
    scale_output();
    add_own(block_);
    if (left > 1) add_other(kFromOdd, block_ + 1);
    block_ += left > 1 ? 2 : 1;
  }

  // The second consumer's: its scores are those of the other block.
  __device__ __forceinline__ void odd_step(int key_block, int left) {
    if (left == 1) {
      release_q(true);
      add_other(kFromEven, block_);
      ++block_;
      return;
    }
    AccS s;
    // Where products are waited for, scores are multiplied beside the other's softmax. Where memory
    // is, the block in front had better be done with: its buffer is the next one's.
    ptx::named_barrier_sync(kTurn, 2 * kThreads);
    if (is_coming(block_ + 1)) {
      start_scores(s, block_ + 1);
      const Sight sight = look(key_block);
      wait_for_scores(s, left == 2);
      start_other(kFromEven, block_);
      absorb(s, sight, key_block);
      tile::pack<T>(p_, s);
      wait_for_output(block_);
    } else {
      add_other(kFromEven, block_);
      start_scores(s, block_ + 1);
      const Sight sight = look(key_block);
      wait_for_scores(s, left == 2);
      absorb(s, sight, key_block);
      tile::pack<T>(p_, s);
    }
    tell(kFromOdd);
    scale_output();
    add_own(block_ + 1);
    block_ += 2;
  }

  // Panels [begin, end) of a block.
  __device__ __forceinline__ void wait_for(uint32_t block, int begin, int end) const {
#pragma unroll
    for (int i = begin; i < end; ++i) pipe_.panel(i).wait_full(block);
  }
  // The same, as products see them: what has been gathered needs a fence, which takes long.
  __device__ __forceinline__ void see(uint32_t block, int begin, int end) const {
    wait_for(block, begin, end);
    if (gathers_) ptx::fence_async_proxy();
  }

  // Whether a block is on its way: the same for all threads of the consumer.
  __device__ __forceinline__ bool is_coming(uint32_t block) const {
    const bool has_begun = pipe_.panel(0).is_full(block);
    return ptx::named_barrier_all(kOwn + consumer_, kThreads, has_begun);
  }

  // Rows of V behind the sequence become zeros: p is zero there, but they may hold infinities.
  __device__ void clear_tail(int key_block) const {
    const auto& t = pipe_.tile(tile_);
    if (key_block != t.end - 1 || t.tail >= Cfg::kBlockN) return;
    wait_for(block_, 0, Cfg::kPanels);
    tile::clear_rows<TileKV, kThreads>(pipe_.k_buffer(block_), t.tail, Own::thread());
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(kOwn + consumer_, kThreads);
  }

  __device__ __forceinline__ void start_scores(AccS& s, uint32_t block) {
    const uint32_t q = operand(pipe_.q_buffer());
    const uint32_t k = operand(pipe_.k_buffer(block));
    // Panel by panel, as they come.
    if (gathers_) see(block, 0, Cfg::kPanels);
    const auto wait = [&](int panel) { wait_for(block, panel, panel + 1); };
    if (params_.has_qv) {
      tile::start_abt_by_panels<T, TileQ::kCols, TileQ, TileKV>(s, q_, q, k, wait);
    } else {
      tile::start_abt_by_panels<T, Cfg::kHeadDim, TileQ, TileKV>(s, q_, q, k, wait);
    }
  }

  __device__ static uint32_t operand(uint32_t smem) { return tile::operand<true>(smem); }

  // `is_last`: Q has been multiplied for the last time.
  __device__ __forceinline__ void wait_for_scores(AccS& s, bool is_last) const {
    ptx::wgmma_wait<0>();
    ptx::pin(s.c[0]);
    release_q(is_last);
  }

  __device__ __forceinline__ void release_q(bool is_last) const {
    pipe_.q().arrive_empty_if(is_last && Own::thread() == 0, tile_);
  }

  // What is to be known of a block, beside its scores.
  __device__ __forceinline__ Sight look(int key_block) const {
    Sight sight;
    sight.look(params_.scores, pipe_.tile(tile_), 0, key_block);
    return sight;
  }

  // Scores become p, and the shift what both take.
  __device__ __forceinline__ void absorb(AccS& s, const Sight& sight, int key_block) {
    const auto& t = pipe_.tile(tile_);
    float scale = scale_log2_;
    if (!attn::is_plain(params_.scores)) {
      // Of a tile that heads do not share: neither do those of ALiBi.
      const int distance = t.row0 + own_row() + t.sk - t.sq - first_key<Cfg::kBlockN>(key_block);
      transform(s, attn::ScoreRule(params_.scores, t.sequence, t.head), distance);
      scale = attn::kLog2e;
    }
    bool seen[Sight::kPieces] = {true};
    if (!sees_all<Cfg::kBlockN>(t, 0, key_block)) {
      sight.find_seen(seen);
      sight.hide(s, seen);
    }
    softmax_.absorb(s, scale, seen);
  }

  // Hands P and its shift to the other consumer, which has read the last one.
  __device__ __forceinline__ void tell(LatentBarrier barrier) const {
    tile::store_a<TileP>(pipe_.p_buffer(), p_, Own::warp_row(), Own::lane());
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      ptx::st_shared_32(pipe_.shift_of(own_row() + 8 * h), __float_as_uint(softmax_.shift[h]));
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_arrive(barrier, 2 * kThreads);
  }

  __device__ __forceinline__ void scale_output() {
    if (!is_fresh_ && softmax_.is_moved) softmax_.scale_rows(o_);
  }

  // O += P V of the block whose P this consumer has.
  __device__ __forceinline__ void add_own(uint32_t block) {
    if (!params_.has_qv) wait_for_values(block);
    tile::start_pb<T, TileKV>(o_, p_, half_of_v(block), !is_fresh_);
    is_fresh_ = false;
    wait_for_output(block);
    ptx::pin(p_);
  }

  // O += P V of the other consumer's block.
  __device__ __forceinline__ void add_other(LatentBarrier barrier, uint32_t block) {
    start_other(barrier, block);
    wait_for_output(block);
  }

  __device__ __forceinline__ void start_other(LatentBarrier barrier, uint32_t block) {
    ptx::named_barrier_sync(barrier, 2 * kThreads);
    // With a second query, who tells has seen all of the block.
    if (!params_.has_qv || gathers_) wait_for_values(block);
    const float to[2] = {ptx::ld_shared_f32(pipe_.shift_of(own_row())),
                         ptx::ld_shared_f32(pipe_.shift_of(own_row() + 8))};
    // Of a row's four lanes, one may write its next shift.
    __syncwarp();
    softmax_.move_to(to);
    scale_output();
    tile::start_ab<T, TileP, TileKV>(o_, operand(pipe_.p_buffer()), half_of_v(block), !is_fresh_);
    is_fresh_ = false;
  }

  // All products are over, and nobody here needs the block any more.
  __device__ __forceinline__ void wait_for_output(uint32_t block) {
    ptx::wgmma_wait<0>();
    ptx::pin(o_.c[0]);
    // In each CTA of the pair.
    const int thread = Own::thread();
    ptx::mbarrier_arrive_there_if(thread < pipe_.ctas(), pipe_.panel(0).empty(block), thread % 2);
  }

  // This consumer's half of V's panels.
  __device__ __forceinline__ void wait_for_values(uint32_t block) const {
    if (consumer_ == 0) {
      see(block, 1, 1 + kHalf);
    } else {
      see(block, 1 + kHalf, Cfg::kPanels);
    }
  }

  __device__ uint32_t half_of_v(uint32_t block) const {
    return operand(pipe_.v_buffer(block)) + consumer_ * kHalf * TileKV::kPanelBytes;
  }

  // Adds the sums of both, and stores what is this consumer's. A row without keys gets O 0.
  __device__ __forceinline__ void finish() {
    const auto& t = pipe_.tile(tile_);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      ptx::st_shared_32(pipe_.sum_of(tile_, consumer_, own_row() + 8 * h),
                        __float_as_uint(softmax_.row_sum(h)));
    }
    ptx::named_barrier_sync(kEnd, 2 * kThreads);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = own_row() + 8 * h;
      const int query = query_of(t, t.row0, row);
      const int head = head_of(t, row);
      if (query >= t.sq || head >= params_.heads_of_tile) continue;
      const float sum = ptx::ld_shared_f32(pipe_.sum_of(tile_, 0, row)) +
                        ptx::ld_shared_f32(pipe_.sum_of(tile_, 1, row));
      const bool is_empty = sum == 0.0f;
      store_row(t, head, query, h, is_empty ? 0.0f : ptx::rcp(sum));
      if (consumer_ == 0 && Own::lane() % 4 == 0) {
        const LseRows to = lse_of(params_, t);
        to.ptr[head * to.head + query] =
            is_empty ? attn::infinity() : (softmax_.shift[h] + ptx::lg2(sum)) * attn::kLn2;
      }
    }
    __syncwarp();
    pipe_.tiles().arrive_empty_if(Own::lane() == 0, tile_);
  }

  __device__ __forceinline__ void store_row(const TileOf<true>& t, int head, int query, int h,
                                            float factor) const {
    const int first = consumer_ * kColumns;
    const int columns = params_.dv - first;
    if (params_.num_splits > 1) {
      const int64_t at = row_of_part(params_, t, head) + query;
      tile::store_row(params_.o_partial + at * params_.dv + first, o_.c[0], h, factor, columns,
                      Own::lane());
    } else {
      const Rows& to = params_.o;
      const int64_t at = t.batch_q * to.batch + (t.head + head) * to.head +
                         (int64_t{t.first_q} + query) * to.row + first;
      tile::store_row<T>(static_cast<uint16_t*>(to.ptr) + at, o_.c[0], h, factor, columns,
                         Own::lane());
    }
  }

  const ForwardParams& params_;
  const float scale_log2_;
  const LatentPipeline<Cfg>& pipe_;
  const int consumer_;
  const bool gathers_;
  typename Cfg::AccO o_;
  uint32_t p_[Cfg::kBlockN / 16][4];
  uint32_t q_[Cfg::kHeldPanels][4][4];
  Softmax softmax_;
  uint32_t tile_ = 0;   // counted from the start
  uint32_t block_ = 0;  // likewise: the first of the two that are due
  bool is_fresh_;       // O has no sums yet, whatever its registers hold
};

}  // namespace flash::sm90
