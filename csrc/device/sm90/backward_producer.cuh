// Which blocks of keys a CTA works on, and the loads of all operands.
#pragma once

#include "sm90/backward_pipeline.cuh"
#include "sm90/producer.cuh"

namespace flash::sm90 {

// Blocks of keys that this CTA works on: the first is its own, each later one the next that no CTA
// has; or only its own. Where blocks wait for one another, the first is taken like the others: then
// those in front of it are in hand, even if not all CTAs run at once.
//
// Sequences that have lengths come in their order (BackwardParams::order), without blocks that have
// no keys, so that those of few queries fill the gaps at the end.
//
// Heads come in sections, of which all CTAs that run together have the queries in common. Under a
// causal mask the first keys are seen by most queries: their blocks start first. Where sums of dQ
// must have one order, the last keys' do, because a block adds behind those of later keys.
template <class Cfg>
struct KeySchedule {
  const BackwardParams& params;

  // Fills in block `index`, or that there are no more. False: it has no keys.
  __device__ bool find(KeyBlock& block, uint32_t index) const {
    if (is_shared() && params.order) {
      find_in_order(block, index);
    } else {
      find_in(block, index, (params.seqs.sk + Cfg::kBlockN - 1) / Cfg::kBlockN, params.seqs.b,
              params.heads_per_section);
    }
    if (block.is_last) return true;
    ptx::forget();  // what is in the block by now: registers are few
    place(block, attn::Sequence(params.seqs, block.sequence));
    if (block.first >= block.sk) return false;
    ptx::forget();
    find_steps(block);
    ptx::forget();
#pragma unroll 1
    for (int consumer = 0; consumer < Cfg::kConsumers; ++consumer) {
      find_whole_steps(block, consumer);
    }
    ptx::forget();
    find_sums(block);
    return true;
  }
  __device__ uint32_t first() const {
    if (is_shared() && params.order) ptx::wait_for_kernel_in_front();
    return is_shared() && waits_for_others() ? next() : blockIdx.x;
  }
  __device__ uint32_t next() const {
    if (!is_shared()) return ~0u;
    ptx::wait_for_kernel_in_front();  // which clears the counter
    const uint32_t own = waits_for_others() ? 0 : ptx::opaque(static_cast<int>(gridDim.x));
    return own + static_cast<uint32_t>(ptx::atomic_add(params.next_block, 1));
  }

 private:
  // Among blocks of `b` sequences that have as many each.
  __device__ void find_in(KeyBlock& block, uint32_t index, uint32_t num_blocks, uint32_t b,
                          uint32_t section) const {
    block.is_last = index >= num_blocks * params.hk * b;
    if (block.is_last) return;
    const attn::TileIndex at(index, num_blocks, params.hk, b, section);
    block.sequence = at.sequence;
    block.head = at.head;
    block.first = Cfg::kBlockN * (is_in_turn() ? at.block_m : num_blocks - 1 - at.block_m);
  }

  // Among those of sequences in their order.
  __device__ void find_in_order(KeyBlock& block, uint32_t index) const {
    const auto blocks_before = [&](int i) { return params.order[2 * i + 1]; };
    int low = 0;  // blocks_before(low) <= index < blocks_before(high)
    int high = params.seqs.b;
    block.is_last = index >= blocks_before(high);
    if (block.is_last) return;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (blocks_before(middle) <= index ? low : high) = middle;
    }
    const uint32_t first = blocks_before(low);
    const uint32_t num_blocks = (blocks_before(low + 1) - first) / params.hk;
    find_in(block, index - first, num_blocks, 1, max(gridDim.x / num_blocks, 1u));
    block.sequence = static_cast<int>(params.order[2 * low]);
  }

  __device__ bool is_shared() const {
    return Cfg::kTile.takes_blocks() && params.next_block != nullptr;
  }
  // Sums of dQ have one order.
  __device__ bool is_in_turn() const { return Cfg::kByKeys && params.deterministic; }
  __device__ bool waits_for_others() const { return is_in_turn() || leaves_zeros<Cfg>(params); }

  __device__ void place(KeyBlock& block, const attn::Sequence& seq) const {
    const Sequences& seqs = params.seqs;
    place_sequence(block, seqs, seq);
    // Behind the last row of an operand there are zeros; behind a sequence there is anything.
    block.tail_q =
        tail(seq.sq, seqs.cu_seqlens_q ? seqs.total_q - block.first_q : seqs.sq, Cfg::kBlockM);
    block.tail_k =
        tail(seq.sk, seqs.cu_seqlens_k ? seqs.total_k - block.first_k : seqs.sk, Cfg::kBlockN);
  }

  __device__ void find_steps(KeyBlock& block) const {
    const attn::Mask mask(params.scores, block.sq, block.sk);
    block.begin = mask.first_query(block.first) / Cfg::kBlockM;
    block.end = blocks_to(mask.end_query(min(block.first + Cfg::kBlockN, block.sk) - 1));
    block.start = params.turns && !is_in_turn() ? start_of(block) : block.begin;
  }

  // Blocks of keys that run side by side start at queries apart: who would store the first sums of
  // some seldom finds another at it.
  __device__ static int start_of(const KeyBlock& block) {
    const float place = static_cast<float>(block.first) / static_cast<float>(block.sk);
    const int at = static_cast<int>(place * static_cast<float>(block.sq)) / Cfg::kBlockM;
    return max(block.begin, min(at, block.end - 1));
  }

  // Of which steps a consumer sees all.
  __device__ void find_whole_steps(KeyBlock& block, int consumer) const {
    const attn::Mask mask(params.scores, block.sq, block.sk);
    const int own = Cfg::kByKeys ? block.first + 64 * consumer : block.first;
    block.full_begin[consumer] = blocks_to(mask.first_query(min(own + 64, block.sk) - 1));
    ptx::forget();
    const int full_end = mask.end_query(own);
    const bool ends_whole = full_end >= block.sq && block.tail_q == 0;
    // Rows that TMA has filled in have P 0, whatever they see.
    block.full_end[consumer] = own + 64 > block.sk ? 0
                               : ends_whole        ? block.end
                                                   : min(full_end, block.sq) / Cfg::kBlockM;
  }

  __device__ void find_sums(KeyBlock& block) const {
    const int group = params.hq / params.hk;
    block.first_head = block.head * group;
    block.end_head = block.first_head + group;
    block.first_sum =
        static_cast<int>(attn::PaddedRows(params, block.sequence, block.first_head).first);
  }

  __device__ static int blocks_to(int query) { return (query + Cfg::kBlockM - 1) / Cfg::kBlockM; }

  // `num_rows` in use of `room`.
  __device__ static int tail(int num_rows, int room, int block) {
    return num_rows < room ? num_rows % block : 0;
  }
};

// Until blocks of the section in front have zeroed what this block's dQ is added to.
template <class Cfg>
__device__ inline void wait_for_zeros(const BackwardParams& params, const KeyBlock& block) {
  if (!leaves_zeros<Cfg>(params)) return;
  const uint32_t section = params.heads_per_section;
  const uint32_t head = block.sequence * params.hk + block.head;
  if (head < params.heads_zeroed) return;
  ptx::wait_until_equal(params.zeroed + head / section * section, blocks_that_zero<Cfg>(params));
}

// Zeroes the part of block `index` in the sums of the next section: they are in L2 when they are
// added to, which those that the delta kernel zeroes seldom are.
template <class Cfg>
__device__ inline void zero_sums(const BackwardParams& params, const BackwardPipeline<Cfg>& pipe,
                                 uint32_t index) {
  if (!leaves_zeros<Cfg>(params)) return;
  constexpr int kBytes = Cfg::kTile.zeros_bytes();
  constexpr int kPiecesOf128Rows = 128 * Cfg::kHeadDim * 4 / kBytes;
  const uint32_t section = params.heads_per_section;
  const uint32_t blocks = blocks_of_section<Cfg>(params);
  const uint32_t heads = params.hk * params.seqs.b;
  const uint32_t first = (index / blocks + 1) * section;
  const uint32_t place = index % blocks;
  const uint32_t sharing = blocks_that_zero<Cfg>(params);
  if (first >= heads || place >= sharing) return;
  const uint32_t rows = static_cast<uint32_t>(params.delta_head) * (params.hq / params.hk);
  const uint32_t of_head = rows / 128 * kPiecesOf128Rows;
  const uint32_t all = min(section, heads - first) * of_head;
  const uint32_t each = (all + sharing - 1) / sharing;
  const uint32_t begin = place * each;
  char* to = reinterpret_cast<char*>(params.dq_accum) + (int64_t{first} * of_head + begin) * kBytes;
#pragma unroll 1
  for (uint32_t end = min(begin + each, all), at = begin; at < end; ++at, to += kBytes) {
    ptx::bulk_store(to, pipe.zeros(), kBytes);
  }
  ptx::tma_store_commit();
  ptx::tma_store_wait();
  ptx::red_release_add(params.zeroed + first, 1);
}

// One lane's work: what the CTA does in each round, and the loads of K. No block is taken before
// the one in front is about to end: another CTA may be free sooner.
template <class Cfg>
__device__ inline void plan_blocks(const TmaBackwardParams& params,
                                   const BackwardPipeline<Cfg>& pipe) {
  using TileK = typename Cfg::TileK;
  const KeySchedule<Cfg> schedule{params.call};
  uint32_t keys = 0;  // blocks of them that were loaded
  for (int i = 0;; ++i) {
    const auto again = [&] { return ptx::opaque(i); };  // so that nothing made of it is kept
    KeyBlock& block = pipe.block(i);
    pipe.blocks().wait_empty(i);
    block.index = i == 0 ? schedule.first() : schedule.next();
    while (!schedule.find(block, block.index)) block.index = schedule.next();
    pipe.blocks().arrive_full(again());
    if (block.is_last) return;
    if (block.begin < block.end) {
      // dQ is made of K: so nothing is added to sums that are not zero yet.
      if constexpr (Cfg::kByKeys) wait_for_zeros<Cfg>(params.call, block);
      pipe.keys().wait_empty(keys);
      load_tile<TileK>(pipe.k_buffer(keys), params.k, pipe.keys().full(keys), TileK::kCols / 64,
                       block.first_k + block.first, block.head, block.batch_k);
      ++keys;
    }
    if constexpr (Cfg::kByKeys) zero_sums<Cfg>(params.call, pipe, block.index);
    pipe.loads().wait_full(again());
  }
}

// One lane's work: for each block of keys Q, dO, lse and delta of its steps, and V with the first
// dO.
template <class Cfg>
__device__ inline void load_steps(const TmaBackwardParams& params,
                                  const BackwardPipeline<Cfg>& pipe) {
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  constexpr int kPanels = TileQ::kCols / 64;
  constexpr int kPanelsOfV = (Cfg::kValueDim + 63) / 64;
  constexpr int kStatisticsBytes = Cfg::kBlockM * 2 * 4;
  const BackwardParams& call = params.call;
  uint32_t step = 0;
  uint32_t values = 0;  // blocks of them that were loaded
  for (uint32_t round = 0;; ++round) {
    pipe.blocks().wait_full(round);
    const KeyBlock& block = pipe.block(round);
    if (block.is_last) return;
    if (round == 0) {
      ptx::wait_for_kernel_in_front();
      ptx::let_kernel_behind_begin();
    }
    int left = num_steps(block);
    for (int head = block.first_head; head < block.end_head; ++head) {
      const float* statistics =
          call.statistics +
          2 * attn::PaddedRows(call, block.sequence, head, call.statistics_head).first;
      int m = block.start;
      for (int i = block.begin; i < block.end; ++i, ++step) {
        const int row = block.first_q + m * Cfg::kBlockM;
        const uint32_t full = pipe.queries().full(step);
        pipe.loads().arrive_full_if(--left == 0, round);
        pipe.queries().wait_empty(step);
        load_tile<TileQ>(pipe.q_buffer(step), params.q, full, kPanels, row, head, block.batch_q,
                         kStatisticsBytes);
        ptx::bulk_load(pipe.statistics(step), statistics + 2 * m * Cfg::kBlockM, kStatisticsBytes,
                       full);
        const bool is_first = i == block.begin && head == block.first_head;
        load_tile<TileQ>(pipe.dout_buffer(step), params.dout, pipe.douts().full(step), kPanelsOfV,
                         row, head, block.batch_q, is_first ? kPanelsOfV * TileK::kPanelBytes : 0);
        if (is_first) {
          pipe.values().wait_empty(values++);
          copy_tile<TileK>(pipe.v_buffer(), params.v, pipe.douts().full(step), kPanelsOfV,
                           block.first_k + block.first, block.head, block.batch_k);
        }
        if (++m == block.end) m = block.begin;
      }
    }
    pipe.loads().arrive_full_if(block.begin >= block.end, round);
    pipe.blocks().arrive_empty(round);
  }
}

}  // namespace flash::sm90
