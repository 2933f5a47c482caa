// A warpgroup that computes: 64 rows of each of the CTA's tiles.
#pragma once

#include "ptx/tma.cuh"
#include "sm90/fp8_softmax.cuh"
#include "sm90/fp8_transpose.cuh"
#include "sm90/producer.cuh"
#include "sm90/recompute.cuh"
#include "sm90/transform.cuh"
#include "sm90/turns.cuh"
#include "tile/store.cuh"
#include "tile/warpgroup.cuh"

namespace flash::sm90 {

template <class Cfg>
class Consumer {
  using T = typename Cfg::T;
  using Out = typename Cfg::Out;
  using TileQ = typename Cfg::TileQ;
  using TileO = typename Cfg::TileO;
  using TileK = typename Cfg::TileK;
  using AccS = typename Cfg::AccS;
  using AccO = typename Cfg::AccO;
  static constexpr int kBlockN = Cfg::kBlockN;
  static constexpr int kHeadDim = Cfg::kHeadDim;
  static constexpr int kHalf = kHeadDim / 32 * 16;  // columns of O

 public:
  __device__ __forceinline__ Consumer(const TmaForwardParams& params, const Pipeline<Cfg>& pipe)
      : params_(params.call),
        o_map_(params.o),
        all_scale_log2_(params.scale_log2),
        scale_log2_(params.scale_log2),
        pipe_(pipe),
        consumer_(ptx::uniform(threadIdx.x / 128 - 1)) {}

  __device__ __forceinline__ void run() {
    if (Cfg::kTile.takes_turns) turns().begin();
    pipe_.tiles().wait_full(0);
    if (pipe_.tile(0).end > 0) {
      if constexpr (Cfg::kHasOBuffer) {
        run_joined();
      } else {
        run_apart();
      }
    }
    if (Cfg::kTile.takes_turns) turns().end();
  }

 private:
  // Tile after tile without a gap.
  __device__ __forceinline__ void run_joined() {
    open(0);
    first_step();
    for (;;) {
      const bool opens = left_ == 0;
      if (opens) {
        pipe_.tiles().wait_full(tile_ + 1);
        if (pipe_.tile(tile_ + 1).end == 0) break;
        open(tile_ + 1);
      }
      step(opens);
    }
    last_step();
  }

  // Tile after tile, where there is no room for the next Q, nor for all of O.
  __device__ __forceinline__ void run_apart() {
    for (uint32_t tile = 0; pipe_.tile(tile).end > 0; ++tile) {
      open(tile);
      skip_blocks(pipe_.tile(tile).skipped[consumer_]);
      first_step();
      while (left_ > 0) step(false);
      last_step();
      ++block_;
      pipe_.tiles().wait_full(tile + 1);
    }
    store_rest(tile_);
    ptx::tma_store_wait();
  }

  // Goes on to a tile's scores.
  __device__ __forceinline__ void open(uint32_t tile) {
    tile_ = tile;
    left_ = pipe_.tile(tile).end - pipe_.tile(tile).begin;
    lazy_left_ = 0;
    is_careful_ = !is_plain();
    pipe_.q(consumer_).wait_full(tile);
    if constexpr (Cfg::kIsFp8) scale_log2_ = all_scale_log2_ * pipe_.descale(tile).qk;
    if constexpr (Cfg::kTile.holds_q) {
      tile::load_a<TileQ>(q_, pipe_.q_buffer(tile, consumer_), warp_row(), lane());
      release_q(true);
    }
  }

  // Gives back the first blocks of a tile in front of which no product is due.
  __device__ __forceinline__ void skip_blocks(int blocks) {
#pragma unroll 1
    for (left_ -= blocks; blocks > 0; --blocks, ++block_) {
      pipe_.k().wait_full(block_);
      release(pipe_.k(), block_);
      pipe_.v().wait_full(block_);
      release(pipe_.v(), block_);
    }
  }

  // How many blocks, from the one in front of this down, may have a lazy maximum; below 1 there is
  // none. All rows see them to the full, and have seen a key behind them.
  __device__ int lazy_run(const Tile& t, int key_block) const {
    const attn::Keys seen = t.seen_by_all[consumer_];
    if (is_careful_ || seen.end <= key_block * kBlockN) return 0;
    return key_block - (seen.begin + kBlockN - 1) / kBlockN;
  }

  // Scores go to softmax as they are.
  __device__ bool is_plain() const {
    if (Cfg::kIsPlain) return true;
    return attn::is_plain(params_.scores);
  }

  // Scores of the first block of all, or of a tile that is done by itself.
  __device__ __forceinline__ void first_step() {
    AccS s;
    pipe_.k().wait_full(block_);
    start_scores(s, block_);
    ptx::wgmma_wait<0>();
    ptx::pin(s.c[0]);
    release(pipe_.k(), block_);
    softmax_.clear();
    absorb(s);
    if (!Cfg::kHasOBuffer && tile_ > 0) store_rest(tile_ - 1);
    pack(s);
    clear_output();
    count_block();
  }

  // Scores of one block beside the product of the last one with V. `opens`: these are the first
  // scores of a tile, and that product the last of the tile before.
  __device__ __forceinline__ void step(bool opens) {
    AccS s;
    const uint32_t next = block_ + 1;
    pipe_.k().wait_full(next);
    if (Cfg::kTile.takes_turns) turns().take();
    start_scores(s, next);
    start_output(opens ? tile_ - 1 : tile_);
    if (Cfg::kTile.takes_turns) turns().pass();
    ptx::wgmma_wait<1>();
    ptx::pin(s.c[0]);
    release(pipe_.k(), next);

    if (opens) {
      finish_sums(tile_ - 1);
      softmax_.clear();
    }
    if constexpr (Cfg::kIsFp8) {
      absorb(s);
    } else {
      if (lazy_left_ <= 0 || !absorb_lazily(s)) absorb(s);
    }
    ptx::wgmma_wait<0>();
    ptx::pin(o_.c[0]);
    ptx::pin(p_);
    release(pipe_.v(), block_);
    pack(s);
    if (opens) {
      store_output(tile_ - 1);
      clear_output();
    } else if (softmax_.is_moved) {
      softmax_.scale_rows(o_);
    }
    count_block();
    block_ = next;
  }

  // The last product with V of a tile behind which no other stands yet.
  __device__ __forceinline__ void last_step() {
    if (Cfg::kTile.takes_turns) turns().take();
    start_output(tile_);
    if (Cfg::kTile.takes_turns) turns().pass();
    finish_sums(tile_);
    ptx::wgmma_wait<0>();
    ptx::pin(o_.c[0]);
    ptx::pin(p_);
    release(pipe_.v(), block_);
    store_output(tile_);
  }

  __device__ __forceinline__ void count_block() {
    --left_;
    --lazy_left_;
    if (!Cfg::kTile.holds_q) release_q(left_ == 0);
  }

  __device__ __forceinline__ void start_scores(AccS& s, uint32_t block) {
    const uint32_t k = pipe_.k_buffer(block);
    if constexpr (Cfg::kTile.holds_q) {
      tile::start_abt<T, TileK>(s, q_, k);
    } else {
      tile::start_abt<T, Cfg::kDepth, TileQ, TileK>(s, pipe_.q_buffer(tile_, consumer_), k);
    }
  }

  // Zeros in registers would cost the uniform ones that 8-bit kernels count in.
  __device__ __forceinline__ void clear_output() {
    if constexpr (Cfg::kIsFp8) {
      is_fresh_ = true;
    } else {
      o_.clear();
    }
  }

  __device__ __forceinline__ void pack(AccS& s) {
    if constexpr (Cfg::kIsFp8) {
      softmax_.absorb(s, p_, block_scale_);
    } else {
      tile::pack<T>(p_, s);
    }
  }

  // `tile`: of P.
  __device__ __forceinline__ void start_output(uint32_t tile) {
    pipe_.v().wait_full(block_);
    if constexpr (Cfg::kIsFp8) {
      tile::start_pbt<T, typename Cfg::TileVt>(o_, p_, pipe_.v_buffer(block_), !is_fresh_);
      is_fresh_ = false;
    } else {
      if (is_cut_) clear_tail(pipe_.tile(tile).tail);
      is_cut_ = false;
      tile::start_pb<T, TileK>(o_, p_, pipe_.v_buffer(block_));
    }
  }

  // Rows of V behind the sequence become zeros: p is zero there, but they may hold infinities. Both
  // consumers do it, and neither waits for the other.
  __device__ void clear_tail(int tail) {
    tile::clear_rows<TileK, 128>(pipe_.v_buffer(block_), tail, thread());
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(1 + consumer_, 128);
  }

  // The ordinary way: for blocks of which some row does not see all, or whose scores must be
  // transformed first. 8-bit elements have no other; what all rows see needs no look-ups.
  __device__ __forceinline__ void absorb(AccS& s) {
    const Tile& t = pipe_.tile(tile_);
    const attn::Mask mask(params_.scores, t.sq, t.sk);
    const int key_block = t.begin + left_ - 1;
    const int first = key_block * kBlockN;
    const attn::Keys seen = t.seen_by_all[consumer_];
    const bool is_whole = seen.begin <= first && seen.end >= first + kBlockN;
    const int row = t.row0 + 64 * consumer_ + warp_row() + lane() / 4;
    const int col = first + lane() % 4 * 2;
    float scale = scale_log2_;
    if (!is_plain()) {
      attn::ScoreRule rule(params_.scores, t.sequence, t.head);
      if constexpr (Cfg::kIsFp8) rule.scale *= pipe_.descale(tile_).qk;
      transform(s, rule, row + mask.diagonal - col);
      scale = attn::kLog2e;
    }
    if (!(Cfg::kIsFp8 && lazy_left_ > 0) && !is_whole) attn::hide(s, mask, row, col);
    if constexpr (Cfg::kIsFp8) {
      // Scores become p where there is room for it, behind the product that reads the last one.
      if (lazy_left_ <= 0) lazy_left_ = lazy_run(t, key_block) + 1;
      block_scale_ = scale;
      softmax_.move(s, scale);
    } else {
      if (softmax_.absorb(s, scale)) is_careful_ = true;
      // One more: this block will be counted too.
      lazy_left_ = lazy_run(t, key_block) + 1;
      is_cut_ = key_block == t.end - 1 && t.tail < kBlockN;
    }
  }

  // False: the scores stand as they were, for the ordinary way.
  __device__ __forceinline__ bool absorb_lazily(AccS& s) {
    if (softmax_.absorb_lazily(s, scale_log2_)) return true;
    recompute<Cfg>(s, params_, pipe_.tile(tile_), q_in_memory(), warp_row(),
                   (pipe_.tile(tile_).begin + left_ - 1) * kBlockN, lane());
    is_careful_ = true;  // such scores are likely to grow again
    return false;
  }

  // This warp's rows of Q in shared memory; if they have left it, once more, where O will be.
  __device__ uint32_t q_in_memory() const {
    if constexpr (Cfg::kTile.holds_q) {
      pipe_.o(consumer_).wait_empty(tile_);
      tile::store_a<TileQ>(pipe_.o_buffer(consumer_), q_, warp_row(), lane());
      __syncwarp();
      return pipe_.o_buffer(consumer_);
    } else {
      return pipe_.q_buffer(tile_, consumer_);
    }
  }

  // Writes the log-sum-exp of a tile for those who store it, and keeps what normalises its O. A row
  // without keys gets O 0.
  __device__ __forceinline__ void finish_sums(uint32_t tile) const {
    const uint32_t row = (warp_row() + lane() / 4) * 4;
    pipe_.o(consumer_).wait_empty(tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = softmax_.row_sum(h);
      const bool is_empty = sum == 0.0f;
      float factor = is_empty ? 0.0f : ptx::rcp(sum);
      if constexpr (Cfg::kIsFp8) factor *= pipe_.descale(tile).v;
      const float lse_of_row = (softmax_.shift[h] + ptx::lg2(sum)) * attn::kLn2;
      // The same from all four lanes of a row.
      ptx::st_shared_32(pipe_.factor_buffer(consumer_) + row + 32 * h, __float_as_uint(factor));
      ptx::st_shared_32(pipe_.lse_buffer(consumer_) + row + 32 * h,
                        __float_as_uint(is_empty ? attn::infinity() : lse_of_row));
    }
  }

  // Normalises and stores O.
  __device__ __forceinline__ void store_output(uint32_t tile) {
    if constexpr (Cfg::kIsFp8) {
      store_output(tile, in_order_of_columns(o_));
    } else {
      store_output(tile, o_);
    }
  }

  __device__ __forceinline__ void store_output(uint32_t tile, const AccO& o) {
    const Tile& t = pipe_.tile(tile);
    const uint32_t factors = pipe_.factor_buffer(consumer_) + (warp_row() + lane() / 4) * 4;
    __syncwarp();
    const float factor[2] = {ptx::ld_shared_f32(factors), ptx::ld_shared_f32(factors + 32)};
    if constexpr (Cfg::kHasOBuffer) {
      const uint32_t smem = pipe_.o_buffer(consumer_);
      tile::store_matrix<Out, TileO>(smem, o, factor, warp_row(), lane());
      if (!is_stored_whole(params_, t, consumer_)) {
        store_rows<TileO>(params_, t, smem, consumer_, warp_row(), 0, lane());
      }
      ptx::fence_async_proxy();
      pipe_.o(consumer_).arrive_full(tile);
    } else {
      uint32_t half[kHalf / 16][4];
      tile::pack<Out>(rest_, o, factor, kHalf / 8);
      tile::pack<Out>(half, o, factor, 0);
      store_half(t, half, 0);
    }
  }

  // The second half of O's columns, for which there was no room beside the first.
  __device__ __forceinline__ void store_rest(uint32_t tile) {
    store_half(pipe_.tile(tile), rest_, kHalf);
    pipe_.o(consumer_).arrive_full(tile);
  }

  // Half of O, from column `col` on: it leaves while the consumer goes on.
  __device__ __forceinline__ void store_half(const Tile& t, const uint32_t (&half)[kHalf / 16][4],
                                             int col) const {
    const uint32_t smem = pipe_.o_buffer(consumer_);
    const bool is_whole = is_stored_whole(params_, t, consumer_);
    ptx::tma_store_wait_read<0>();
    ptx::named_barrier_sync(1 + consumer_, 128);
    tile::store_a<TileO>(smem, half, warp_row(), lane());
    if (!is_whole) store_rows<TileO>(params_, t, smem, consumer_, warp_row(), col, lane());
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(1 + consumer_, 128);
#pragma unroll
    for (int panel = 0; panel < kHalf / 64; ++panel) {
      const int at = col + 64 * panel;
      ptx::tma_store_if(is_whole && thread() == 0 && at < params_.dv, o_map_,
                        smem + panel * TileO::kPanelBytes, at, t.first_q + t.row0 + 64 * consumer_,
                        t.head, t.batch_q);
    }
    ptx::tma_store_commit();
  }

  // `is_last`: this warp has read the tile's Q for the last time.
  __device__ __forceinline__ void release_q(bool is_last) const {
    __syncwarp();
    pipe_.q(consumer_).arrive_empty_if(is_last && lane() == 0, tile_);
  }

  // By one lane: products are over for the whole warpgroup at once.
  template <class Ring>
  __device__ void release(const Ring& ring, uint32_t block) const {
    ring.arrive_empty_if(thread() == 0, block);
  }

  // Opaque, so that nothing that is seldom needed is computed ahead and kept.
  __device__ static int index() { return ptx::opaque(static_cast<int>(threadIdx.x)); }
  __device__ static int thread() { return index() % 128; }
  __device__ Turns<Cfg::kConsumers> turns() const { return {consumer_}; }
  __device__ static int lane() { return index() % 32; }
  __device__ static int warp_row() { return thread() / 32 * 16; }

  const ForwardParams& params_;
  const TensorMap& o_map_;
  const float all_scale_log2_;
  float scale_log2_;   // of the tile
  float block_scale_;  // of scores that are not p yet
  const Pipeline<Cfg>& pipe_;
  const int consumer_;
  AccO o_;
  uint32_t p_[Cfg::kDepthOfP / 16][4];
  uint32_t q_[Cfg::kDepth / 16][4];  // where the tile's Q is held
  uint32_t rest_[kHalf / 16][4];     // of O, where it leaves in two halves
  typename SoftmaxOf<Cfg::kIsFp8>::Type softmax_;
  uint32_t tile_ = 0;   // of the scores, counted from the start
  uint32_t block_ = 0;  // of P, counted likewise: its product with V is due
  int left_;            // blocks of the tile whose scores are due, descending
  int lazy_left_;       // of these, how many may have a lazy maximum from now on
  bool is_fresh_;       // O has no sums yet, whatever its registers hold
  bool is_careful_;     // no lazy maximum in this tile any more
  bool is_cut_;         // in the block of P, V has rows behind the sequence
};

}  // namespace flash::sm90
