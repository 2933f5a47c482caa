// A warpgroup that computes: 64 rows of each of the CTA's tiles.
#pragma once

#include "sm90/fp8_softmax.cuh"
#include "sm90/output.cuh"
#include "sm90/recompute.cuh"
#include "sm90/returns.cuh"
#include "sm90/sight.cuh"
#include "sm90/transform.cuh"
#include "sm90/turns.cuh"
#include "tile/warpgroup.cuh"

namespace flash::sm90 {

template <class Cfg>
class Consumer {
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  using AccS = typename Cfg::AccS;
  using AccO = typename Cfg::AccO;
  static constexpr int kBlockN = Cfg::kBlockN;
  using Sight = SightOf<kBlockN>;
  static constexpr bool kStartsFresh = Cfg::kIsFp8 || Cfg::kHasOBuffer;
  static constexpr bool kRoundsEarly = Cfg::kTile.rounds_early();
  static constexpr int kEarly = kRoundsEarly ? kBlockN / 16 : 0;  // accumulators
  // Steps that open a tile are code of their own, where there are registers for that.
  static constexpr bool kStepsApart = !(Cfg::kIsFp8 && Cfg::kConsumers == 3);
  static constexpr int kFew = Cfg::kTile.few_keys();
  // Where each block moves the shift, the ordinary way is the shorter one. Four consumers have no
  // registers to know that.
  static constexpr bool kKnowsRising = Cfg::kConsumers != 4;
  // Where Q is not held: as soon as all scores are there, as they need never be computed again.
  static constexpr bool kReturnsQEarly = Cfg::kIsFp8 && !Cfg::kTile.holds_q;

 public:
  __device__ __forceinline__ Consumer(const TmaForwardParams& params, const Pipeline<Cfg>& pipe)
      : params_(params.call),
        all_scale_log2_(params.scale_log2),
        scale_log2_(params.scale_log2),
        pipe_(pipe),
        consumer_(ptx::uniform(threadIdx.x / 128 - 1)),
        returns_{pipe, consumer_},
        output_(params, pipe, consumer_) {}

  __device__ __forceinline__ void run() {
    // Else ptxas 12.8 makes products wait for each other.
    o_.clear();
    if (Cfg::kTile.takes_turns) turns().begin();
    pipe_.tiles().wait_full(0);
    if (pipe_.tile(0).end > 0) {
      if constexpr (Cfg::kIsJoined) {
        run_joined();
      } else {
        run_apart();
      }
    }
    if (Cfg::kTile.takes_turns) turns().end();
  }

 private:
  // Tile after tile without a gap, except in front of one whose first blocks are skipped.
  __device__ __forceinline__ void run_joined() {
    open(0);
    for (;;) {
      skip_blocks(skipped(pipe_.tile(tile_)));
      first_step();
      for (;;) {
        if (kStepsApart) {
          while (left_ > 0) step(false);
        }
        const bool opens = kStepsApart || left_ == 0;
        if (opens) {
          pipe_.tiles().wait_full(tile_ + 1);
          const Tile& next = pipe_.tile(tile_ + 1);
          if (next.end == 0 || skipped(next) > 0) break;
          open(tile_ + 1);
        }
        step(opens);
      }
      last_step();
      if (!Cfg::kTile.skips_blocks() || pipe_.tile(tile_ + 1).end == 0) break;
      ++block_;
      open(tile_ + 1);
    }
  }

  // Tile after tile, where there is no room for the next Q.
  __device__ __forceinline__ void run_apart() {
    for (uint32_t tile = 0; pipe_.tile(tile).end > 0; ++tile) {
      const Tile& t = pipe_.tile(tile);
      const bool is_of_pair = Cfg::kMayPair && pipe_.ctas() > 1;
      if (is_of_pair) skip_blocks(t.of_pair.end - t.end);
      open(tile);
      skip_blocks(skipped(t));
      first_step();
      while (left_ > 0) step(false);
      last_step();
      ++block_;
      if (is_of_pair) skip_blocks(t.begin - t.of_pair.begin);
      pipe_.tiles().wait_full(tile + 1);
    }
    if constexpr (!Cfg::kHasOBuffer) {
      output_.store_rest(tile_);
      ptx::tma_store_wait();
    }
  }

  // Goes on to a tile's scores.
  __device__ __forceinline__ void open(uint32_t tile) {
    const Tile& t = pipe_.tile(tile);
    tile_ = tile;
    left_ = t.end - t.begin - skipped(t);
    whole_left_ = 0;
    is_careful_ = !is_plain();
    pipe_.q(consumer_).wait_full(tile);
    if constexpr (Cfg::kIsFp8) scale_log2_ = all_scale_log2_ * pipe_.descale(tile).qk;
    if constexpr (Cfg::kTile.holds_q) {
      tile::load_a<TileQ>(q_, pipe_.q_buffer(tile, consumer_), Own::warp_row(), Own::lane());
      returns_.q(tile_, true);
    }
  }

  __device__ int skipped(const Tile& t) const {
    return Cfg::kTile.skips_blocks() ? t.skipped[consumer_] : 0;
  }

  // Gives back the next blocks, in front of which no product is due: K first, whose buffers the
  // tile's own blocks wait for. Who multiplies nothing takes its turns all the same.
  __device__ __forceinline__ void skip_blocks(int blocks) {
#pragma unroll 1
    while (blocks > 0) {
      const int some = Cfg::kTile.takes_turns ? 1 : min(blocks, Cfg::kStages);
      returns_.unread(pipe_.k(), block_, some);
      if (Cfg::kTile.takes_turns) {
        turns().take();
        turns().pass();
      }
      returns_.unread(pipe_.v(), block_, some);
      block_ += some;
      blocks -= some;
    }
  }

  // The block whose scores are due, or have come last.
  __device__ int key_block() const { return pipe_.tile(tile_).begin + left_ - 1; }

  // Scores go to softmax as they are.
  __device__ bool is_plain() const { return Cfg::kIsPlain || attn::is_plain(params_.scores); }

  // Scores of the first block of all, or of a tile that is done by itself.
  __device__ __forceinline__ void first_step() {
    const auto& t = pipe_.tile(tile_);
    if (kFew < kBlockN && sees_few<kBlockN, kFew>(params_.scores, t, consumer_, key_block())) {
      first_step_of<kFew>();
    } else {
      first_step_of<kBlockN>();
    }
  }

  template <int kKeys>
  __device__ __forceinline__ void first_step_of() {
    tile::Accumulators<1, kKeys / 8> s;
    pipe_.k().wait_full(block_);
    start_scores(s, block_);
    const Sight sight = look();
    ptx::wgmma_wait<0>();
    ptx::pin(s.c[0]);
    returns_.block(pipe_.k(), block_);
    if (kReturnsQEarly) returns_.q(tile_, left_ == 1);
    softmax_.clear();
    absorb(s, sight);
    if (!Cfg::kHasOBuffer && tile_ > 0) output_.store_rest(tile_ - 1);
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
    if (opens) {
      output_.finish_sums(softmax_, tile_ - 1);
      softmax_.clear();
    }
    Sight sight;
    const bool is_whole = whole_left_ > 0;
    const bool is_rising = kKnowsRising && was_moved_ && softmax_.is_moved;
    const bool is_lazy = !Cfg::kIsFp8 && is_whole && !is_careful_ && !is_rising;
    was_moved_ = softmax_.is_moved;
    if (!is_whole) sight = look();
    ptx::wgmma_wait<1>();
    ptx::pin(s.c[0]);
    returns_.block(pipe_.k(), next);
    if (kReturnsQEarly) returns_.q(tile_, left_ == 1);
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (kRoundsEarly) {
      if (is_lazy) softmax_.template exponentiate<kEarly>(s, sums, scale_log2_, 0);
      wait_for_output();
    }
    if (!is_lazy || !absorb_lazily(s, sums)) {
      absorb(s, sight);
      if (kRoundsEarly) pack(s);
    }
    if (!kRoundsEarly) {
      wait_for_output();
      pack(s);
    }
    if (opens) {
      output_.store(o_, tile_ - 1);
      clear_output();
    } else if (softmax_.is_moved) {
      softmax_.scale_rows(o_);
    }
    count_block();
    block_ = next;
  }

  // O is there, but for the scores of this step.
  __device__ __forceinline__ void wait_for_output() {
    ptx::wgmma_wait<0>();
    ptx::pin(o_.c[0]);
    ptx::pin(p_);
    returns_.block(pipe_.v(), block_);
  }

  // The last product with V of a tile behind which no other stands yet.
  __device__ __forceinline__ void last_step() {
    if (Cfg::kTile.takes_turns) turns().take();
    start_output(tile_);
    if (Cfg::kTile.takes_turns) turns().pass();
    output_.finish_sums(softmax_, tile_);
    wait_for_output();
    output_.store(o_, tile_);
  }

  __device__ __forceinline__ void count_block() {
    --left_;
    --whole_left_;
    if (!Cfg::kTile.holds_q && !kReturnsQEarly) returns_.q(tile_, left_ == 0);
  }

  template <int kN>
  __device__ __forceinline__ void start_scores(tile::Accumulators<1, kN>& s, uint32_t block) {
    const uint32_t k = operand(pipe_.k_buffer(block));
    if constexpr (Cfg::kTile.holds_q) {
      tile::start_abt<T, TileK>(s, q_, k);
    } else {
      tile::start_abt<T, Cfg::kDepth, TileQ, TileK>(s, operand(pipe_.q_buffer(tile_, consumer_)),
                                                    k);
    }
  }

  __device__ static uint32_t operand(uint32_t smem) { return tile::operand<Cfg::kMayPair>(smem); }

  template <int kN>
  __device__ __forceinline__ void pack(tile::Accumulators<1, kN>& s) {
    if constexpr (Cfg::kIsFp8) {
      softmax_.absorb(s, p_, block_scale_);
    } else {
      tile::pack<T>(p_, s);
    }
  }

  // The next product will not add; but where O has no buffer it needs its registers until then.
  __device__ __forceinline__ void clear_output() {
    is_fresh_ = kStartsFresh;
    softmax_.is_moved = false;  // a tile's first block says nothing of the others
    if (!kStartsFresh) o_.clear();
  }

  // `tile`: of P.
  __device__ __forceinline__ void start_output(uint32_t tile) {
    pipe_.v().wait_full(block_);
    if constexpr (Cfg::kIsFp8) {
      tile::start_pbt<T, typename Cfg::TileVt>(o_, p_, pipe_.v_buffer(block_), !is_fresh_);
    } else {
      if (is_cut_) clear_tail(pipe_.tile(tile).tail);
      is_cut_ = false;
      tile::start_pb<T, typename Cfg::TileV>(o_, p_, operand(pipe_.v_buffer(block_)), !is_fresh_);
    }
    is_fresh_ = false;
  }

  // Rows of V behind the sequence become zeros: p is zero there, but they may hold infinities. Each
  // consumer does it, and none waits for another.
  __device__ void clear_tail(int tail) {
    tile::clear_rows<typename Cfg::TileV, 128>(pipe_.v_buffer(block_), tail, Own::thread());
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(1 + consumer_, 128);
  }

  // What is to be known of a block that some row does not see in full.
  __device__ __forceinline__ Sight look() const {
    Sight sight;
    if constexpr (!Cfg::kIsFp8) {
      sight.look(params_.scores, pipe_.tile(tile_), consumer_, key_block());
    }
    return sight;
  }

  // The ordinary way: for blocks of which some row does not see all, and for scores that must be
  // transformed, have turned out hard or keep rising. 8-bit elements have no other.
  template <int kN>
  __device__ __forceinline__ void absorb(tile::Accumulators<1, kN>& s, const Sight& sight) {
    const auto& t = pipe_.tile(tile_);
    const int block = key_block();
    // Of a tile that heads do not share: neither do those of ALiBi, nor of 8-bit elements.
    const int row = first_query(t, consumer_) + Own::warp_row() + Own::lane() / 4;
    const int key = first_key<kBlockN>(block);
    float scale = scale_log2_;
    if (!is_plain()) {
      attn::ScoreRule rule(params_.scores, t.sequence, t.head);
      if constexpr (Cfg::kIsFp8) rule.scale *= pipe_.descale(tile_).qk;
      transform(s, rule, row + t.sk - t.sq - key);
      scale = attn::kLog2e;
    }
    if constexpr (Cfg::kIsFp8) {
      if (whole_left_ <= 0) {
        if (!sees_all<kBlockN>(t, consumer_, block)) {
          attn::hide(s, attn::Mask(params_.scores, t.sq, t.sk), row, key);
        }
        whole_left_ = whole_run<kBlockN, uint32_t>(t, consumer_, block) + 1;
      }
      // Scores become p where there is room for it, behind the product that reads the last one.
      block_scale_ = scale;
      softmax_.move(s, scale);
    } else if (whole_left_ > 0) {
      softmax_.absorb(s, scale);
    } else {
      bool seen[Sight::kPieces];
      sight.find_seen(seen);
      sight.hide(s, seen);
      if (softmax_.absorb(s, scale, seen)) is_careful_ = true;
      // One more: this block will be counted too.
      whole_left_ = whole_run<kBlockN>(t, consumer_, block) + 1;
      is_cut_ = block == t.end - 1 && t.tail < kBlockN;
    }
  }

  // `sums`: of the scores that are p already. False: all stand as they were, for the ordinary way.
  __device__ __forceinline__ bool absorb_lazily(AccS& s, float (&sums)[4]) {
    if constexpr (!Cfg::kIsFp8) {
      softmax_.template exponentiate<kBlockN / 8 - kEarly>(s, sums, scale_log2_, kEarly);
      if (kRoundsEarly) pack(s);
      if (softmax_.settle(s, sums)) {
        if (kRoundsEarly && softmax_.is_moved) pack(s);
        return true;
      }
      recompute<Cfg>(s, params_, pipe_.tile(tile_), q_in_memory(), Own::warp_row(),
                     key_block() * kBlockN, Own::lane());
      is_careful_ = true;  // such scores are likely to grow again
    }
    return false;
  }

  // This warp's rows of Q in shared memory; if they have left it, once more, where O will be.
  __device__ uint32_t q_in_memory() const {
    if constexpr (Cfg::kTile.holds_q) {
      pipe_.o(consumer_).wait_empty(tile_);
      tile::store_a<TileQ>(pipe_.o_buffer(consumer_), q_, Own::warp_row(), Own::lane());
      __syncwarp();
      return pipe_.o_buffer(consumer_);
    } else {
      return pipe_.q_buffer(tile_, consumer_);
    }
  }

  __device__ Turns<Cfg::kConsumers> turns() const { return {consumer_}; }

  const ForwardParams& params_;
  const float all_scale_log2_;
  float scale_log2_;   // of the tile
  float block_scale_;  // of scores that are not p yet
  const Pipeline<Cfg>& pipe_;
  const int consumer_;
  const Returns<Cfg> returns_;
  Output<Cfg> output_;
  AccO o_;
  uint32_t p_[Cfg::kDepthOfP / 16][4];
  uint32_t q_[Cfg::kDepth / 16][4];  // where the tile's Q is held
  typename SoftmaxOf<Cfg::kIsFp8>::Type softmax_;
  uint32_t tile_ = 0;       // of the scores, counted from the start
  uint32_t block_ = 0;      // of P, counted likewise: its product with V is due
  int left_;                // blocks of the tile whose scores are due, descending
  int whole_left_;          // of these, how many all rows see to the full from now on
  bool was_moved_ = false;  // the shift, in the step before the last
  bool is_fresh_ = false;   // O has no sums yet, whatever its registers hold
  bool is_careful_;         // no lazy maximum in this tile any more
  bool is_cut_;             // in the block of P, V has rows behind the sequence
};

}  // namespace flash::sm90
