// What all kinds of consumers of the backward kernel do: where they are, clean tails of buffers,
// and how dK and dV leave.
#pragma once

#include "sm90/backward_scores.cuh"
#include "sm90/backward_sender.cuh"
#include "tile/warpgroup.cuh"

namespace flash::sm90 {

template <class Cfg>
class GradientConsumer {
 public:
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  using TileOut = typename Cfg::TileOut;
  using AccS = typename Cfg::AccS;
  static constexpr int kBlockM = Cfg::kBlockM;
  static constexpr int kBothConsumers = 256;  // threads

 protected:
  // Named barriers: of both consumers, and of each.
  enum { kOfBoth = 1, kOfOne = 2 };

  __device__ __forceinline__ GradientConsumer(const TmaBackwardParams& params,
                                              const BackwardPipeline<Cfg>& pipe)
      : maps_(params),
        params_(params.call),
        pipe_(pipe),
        thread_(ptx::opaque(static_cast<int>(threadIdx.x)) % 128),
        consumer_(ptx::uniform(threadIdx.x / 128) - 1) {}

  // Waits for the next block of keys; false where there is none.
  __device__ __forceinline__ bool has_block() const {
    __syncwarp();
    pipe_.blocks().wait_full(block_);
    return ptx::uniform(block().is_last) == 0;
  }

  // Goes to the first step of the block. False: there is none.
  __device__ __forceinline__ bool has_steps() {
    const KeyBlock& b = block();
    stop_ = ptx::uniform(b.end);
    if (ptx::uniform(b.begin) >= stop_) return false;
    at_ = ptx::uniform(b.start);
    full_begin_ = ptx::uniform(b.full_begin[consumer_]);
    full_end_ = ptx::uniform(b.full_end[consumer_]);
    head_ = ptx::uniform(b.first_head);
    return true;
  }
  // By each warp, behind its last product with K.
  __device__ __forceinline__ void release_keys(uint32_t keys) const {
    __syncwarp();
    pipe_.keys().arrive_empty_if(lane() == 0, keys);
  }
  // Likewise of V.
  __device__ __forceinline__ void release_values() const {
    __syncwarp();
    pipe_.values().arrive_empty_if(lane() == 0, keys_);
  }

  // Likewise of a step's queries.
  __device__ __forceinline__ void release_queries(uint32_t step) const {
    __syncwarp();
    pipe_.queries().arrive_empty_if(lane() == 0, step);
  }

  // Goes to the next step. False: the block has no more.
  __device__ __forceinline__ bool next_step() { return next_of_run() || next_run(); }
  // Steps are runs of blocks of queries, one behind the other: from a head's start to the end, then
  // from its begin to the start. False: the run has no more.
  __device__ __forceinline__ bool next_of_run() {
    ++step_;
    ++at_;
    return at_ < stop_;
  }
  __device__ __forceinline__ bool next_run() {
    const KeyBlock& b = block();
    const int start = ptx::uniform(b.start);
    const int begin = ptx::uniform(b.begin);
    const int end = ptx::uniform(b.end);
    const bool wraps = stop_ == end && begin < start;
    at_ = wraps ? begin : start;
    stop_ = wraps ? start : end;
    if (wraps) return true;
    ++head_;
    return head_ < ptx::uniform(b.end_head);
  }
  // No warp needs the block's record and the bounds of its keys any more.
  __device__ __forceinline__ void close_block() {
    barrier();
    pipe_.blocks().arrive_empty_if(thread() == 0, block_);
    ++block_;
  }

  // Rows of keys and values behind the sequence become zeros: they meet zeros in products, but may
  // hold infinities. `row`, `num_rows`: which of the block's this consumer looks after.
  __device__ __forceinline__ void clean_keys(int row, int num_rows) const {
    const int tail = ptx::uniform(block().tail_k);
    if (tail == 0 || ends_inside()) return;
    pipe_.douts().wait_full(step_);  // with the first, V comes
    clear_rows<TileK>(pipe_.k_buffer(keys_), max(tail, row), row + num_rows);
    clear_rows<TileK>(pipe_.v_buffer(), max(tail, row), row + num_rows);
    finish_clearing();
  }
  // Of keys alone, all rows.
  __device__ __forceinline__ void clean_keys() const {
    const int tail = ptx::uniform(block().tail_k);
    if (tail == 0 || ends_inside()) return;
    clear_rows<TileK>(pipe_.k_buffer(keys_), tail, Cfg::kBlockN);
    finish_clearing();
  }

  // Of 64 keys: which queries see them.
  __device__ __forceinline__ void find_bounds(int row) const {
    const KeyBlock& b = block();
    const attn::Mask mask(params_.scores, b.sq, b.sk);
    if (thread() < 64) {
      const int key = b.first + row + thread();
      const uint32_t to = pipe_.bounds(row + thread());
      ptx::st_shared_32(to, static_cast<uint32_t>(mask.first_query(key)));
      ptx::st_shared_32(to + 4, static_cast<uint32_t>(key < b.sk ? mask.end_query(key) : 0));
    }
    barrier();
  }

  // The same for queries: by each consumer, so that neither waits for the other.
  __device__ __forceinline__ void clean_queries() const {
    if (is_whole()) return;
    const int tail = ptx::uniform(block().tail_q);
    if (tail == 0 || at_ != ptx::uniform(block().sq) / kBlockM) return;
    pipe_.douts().wait_full(step_);
    clear_rows<TileQ>(pipe_.q_buffer(step_), tail, kBlockM);
    clear_rows<TileQ>(pipe_.dout_buffer(step_), tail, kBlockM);
    finish_clearing();
  }

  // What belongs to 64 of the step's queries.
  __device__ __forceinline__ ColumnPairs statistic(Statistic which, int half) const {
    return ColumnPairs(which, pipe_.statistics(step_) + half * 512, lane());
  }

  // Hides what the mask hides: of a warp's 16 keys from the block's `row` on, and 64 of the step's
  // queries.
  __device__ __forceinline__ void hide_unseen(AccS& s, int row, int half) const {
    if (!is_whole()) hide_queries(s, pipe_.bounds(row + lane() / 4), first_query(half));
  }

  // Of scores that are not plain: products S become P, packed in `p`, and what dP - delta is
  // multiplied by in `s`.
  __device__ __forceinline__ void transform_scores(AccS& s, uint32_t (&p)[4][4], int row,
                                                   int half) const {
    const KeyBlock& b = block();
    const ColumnPairs lse = statistic(kLse, half);
    const uint32_t bounds = pipe_.bounds(row + lane() / 4);
    const int query = first_query(half);
    const attn::ScoreRule rule(params_.scores, b.sequence, head_);
    const int distance = query + b.sk - b.sq - (b.first + row + lane() / 4);
    if (params_.scores.softcap > 0.0f) {
      transform<T, true>(s, p, rule, bounds, query, distance, lse);
    } else {
      transform<T, false>(s, p, rule, bounds, query, distance, lse);
    }
  }

  // Rounds 64 rows of a gradient, of which the block's `row` is the first, into the buffer by which
  // they leave; or stores them, where they leave one by one.
  template <class Acc>
  __device__ __forceinline__ void put_out(const Acc& acc, float factor, const Rows& to, int row,
                                          int num_cols) const {
    const float factors[2] = {factor, factor};
    tile::store_matrix<T, TileOut>(out(), acc, factors, warp_row(), lane());
    const int first = block().first + row;
    if (!leave_by_tma(params_, block(), first)) {
      __syncwarp();
      tile::copy_out_rows<TileOut, 16>(rows_of(to, first + warp_row()), to.row, out(), warp_row(),
                                       block().sk - first - warp_row(), num_cols, lane());
    }
    ptx::fence_async_proxy();
  }

  // Stores 64 rows of a gradient, of which the block's `row` is the first, from registers.
  template <class Acc>
  __device__ __forceinline__ void store_rows(const Acc& acc, float factor, const Rows& to, int row,
                                             int num_cols) const {
    const float factors[2] = {factor, factor};
    const int first = block().first + row + warp_row();
    tile::store_rows<T>(rows_of(to, first), to.row, acc, factors, block().sk - first, num_cols,
                        lane());
  }

  // Of 64 keys that no query sees. Their block has no buffers.
  __device__ void store_zeros(int row) const {
    const int first = block().first + row;
    const int num_rows = min(block().sk - first, 64);
    const auto clear = [&](const Rows& x, int num_cols) {
      for (int at = thread(); at < num_rows * (num_cols / 8); at += 128) {
        ptx::st_global_128(rows_of(x, first + at / (num_cols / 8)) + at % (num_cols / 8) * 8,
                           make_uint4(0, 0, 0, 0));
      }
    };
    clear(params_.dk, params_.d);
    clear(params_.dv_grad, params_.dv);
  }

  __device__ uint32_t out() const { return pipe_.out_buffer(consumer_); }
  __device__ const KeyBlock& block() const { return pipe_.block(block_); }
  // All of the step's queries are this sequence's, and see all keys.
  __device__ bool is_whole() const {
    return __builtin_expect(at_ >= full_begin_ && at_ < full_end_, 1);
  }
  // So are the queries of all steps.
  __device__ bool are_whole() const {
    return ptx::uniform(block().begin) >= full_begin_ && ptx::uniform(block().end) <= full_end_;
  }
  // Row `row` of the block's sequence in a gradient of keys.
  __device__ uint16_t* rows_of(const Rows& x, int row) const {
    const KeyBlock& b = block();
    return static_cast<uint16_t*>(x.ptr) + b.batch_k * x.batch + b.head * x.head +
           (int64_t{b.first_k} + row) * x.row;
  }
  // Of this lane's first entry.
  __device__ int first_query(int half) const { return at_ * kBlockM + 64 * half + lane() % 4 * 2; }

  __device__ void barrier() const { ptx::named_barrier_sync(kOfOne + consumer_, 128); }
  __device__ void barrier_of_both() const { ptx::named_barrier_sync(kOfBoth, kBothConsumers); }

  // Opaque, so that nothing that is seldom needed is computed ahead and kept.
  __device__ int thread() const { return ptx::opaque(thread_); }
  __device__ int lane() const { return thread() % 32; }
  __device__ int warp_row() const { return thread() / 32 * 16; }

  const TmaBackwardParams& maps_;
  const BackwardParams& params_;
  const BackwardPipeline<Cfg>& pipe_;
  const int thread_;
  // The rest is the same for all lanes of a warp, as the compiler knows.
  const int consumer_;
  uint32_t block_ = 0;  // of keys, counted from the start
  uint32_t keys_ = 0;   // likewise, of those that are loaded
  uint32_t step_ = 0;   // counted likewise
  // Of the block of keys: where the run of its blocks of queries ends, and which are whole.
  int stop_;
  int full_begin_, full_end_;
  // Of the step: the head, and its block of queries.
  int head_, at_;

 private:
  // So do all keys of the block.
  __device__ __forceinline__ bool ends_inside() const {
    return ptx::uniform(block().first) + Cfg::kBlockN <= ptx::uniform(block().sk);
  }
  template <class Tile>
  __device__ void clear_rows(uint32_t smem, int begin, int end) const {
    constexpr int kChunks = Tile::kCols / tile::kChunk;
#pragma unroll 1
    for (int at = begin * kChunks + thread(); at < end * kChunks; at += 128) {
      ptx::st_shared_128(smem + Tile::offset(at / kChunks, at % kChunks), make_uint4(0, 0, 0, 0));
    }
  }
  __device__ void finish_clearing() const {
    ptx::fence_async_proxy();
    barrier();
  }
};

}  // namespace flash::sm90
