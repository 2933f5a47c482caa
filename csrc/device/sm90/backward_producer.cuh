// Which blocks of keys a CTA works on, and the loads of all operands.
#pragma once

#include "sm90/backward_pipeline.cuh"
#include "sm90/producer.cuh"

namespace flash::sm90 {

// Blocks of keys that this CTA works on.
//
// Heads come in sections, of which all CTAs that run together have the queries in common. Under a
// causal mask the first keys are seen by most queries: their blocks start first. Where sums of dQ
// must have one order, the last keys' do, because a block adds behind those of later keys.
template <class Cfg>
struct KeySchedule {
  const BackwardParams& params;

  // The first one from `index` on.
  __device__ void find(KeyBlock& block, uint32_t index) const {
    const uint32_t num_blocks = (params.seqs.sk + Cfg::kBlockN - 1) / Cfg::kBlockN;
    for (;;) {
      block.is_last = index >= num_blocks * params.hk * params.seqs.b;
      if (block.is_last) return;
      const attn::TileIndex at(index, num_blocks, params.hk, params.seqs.b,
                               params.heads_per_section);
      index += gridDim.x;
      block.index = index;
      const int column = params.deterministic ? at.block_m : num_blocks - 1 - at.block_m;
      const attn::Sequence seq(params.seqs, at.sequence);
      if (column * Cfg::kBlockN < seq.sk) {
        describe(block, seq, at.head, column * Cfg::kBlockN);
        return;
      }
    }
  }

 private:
  __device__ void describe(KeyBlock& block, const attn::Sequence& seq, int head, int first) const {
    const Sequences& seqs = params.seqs;
    block.sequence = seq.index;
    block.head = head;
    block.first = first;
    block.sq = seq.sq;
    block.sk = seq.sk;
    block.first_q = static_cast<int>(seq.first_q);
    block.batch_q = seqs.cu_seqlens_q ? 0 : seq.index;
    block.first_k = static_cast<int>(seq.first_k);
    block.batch_k = seqs.cu_seqlens_k ? 0 : seq.index;

    const attn::Mask mask(params.scores, seq.sq, seq.sk);
    block.begin = mask.first_query(first) / Cfg::kBlockM;
    block.end = blocks_to(mask.end_query(min(first + Cfg::kBlockN, seq.sk) - 1));
    // Behind the last row of an operand there are zeros; behind a sequence there is anything.
    block.tail_q =
        tail(seq.sq, seqs.cu_seqlens_q ? seqs.total_q - block.first_q : seqs.sq, Cfg::kBlockM);
    block.tail_k =
        tail(seq.sk, seqs.cu_seqlens_k ? seqs.total_k - block.first_k : seqs.sk, Cfg::kBlockN);
#pragma unroll
    for (int consumer = 0; consumer < Cfg::kConsumers; ++consumer) {
      const int own = Cfg::kByKeys ? first + 64 * consumer : first;
      const int last = min(own + 64, seq.sk) - 1;
      const int full_end = mask.end_query(own);
      const bool ends_whole = full_end >= seq.sq && block.tail_q == 0;
      // Rows that TMA has filled in have P 0, whatever they see.
      block.full_begin[consumer] = blocks_to(mask.first_query(last));
      block.full_end[consumer] = ends_whole ? block.end : min(full_end, seq.sq) / Cfg::kBlockM;
      if (own + 64 > seq.sk) block.full_end[consumer] = 0;
    }
    block.first_sum =
        static_cast<int>(attn::PaddedRows(params, seq.index, head * (params.hq / params.hk)).first);
  }

  __device__ static int blocks_to(int query) { return (query + Cfg::kBlockM - 1) / Cfg::kBlockM; }

  // `num_rows` in use of `room`.
  __device__ static int tail(int num_rows, int room, int block) {
    return num_rows < room ? num_rows % block : 0;
  }
};

// One thread's work: what the CTA does in round i.
template <class Cfg>
__device__ inline void plan_block(const BackwardParams& params, const BackwardPipeline<Cfg>& pipe,
                                  uint32_t i) {
  const KeySchedule<Cfg> schedule{params};
  pipe.blocks().wait_empty(i);
  schedule.find(pipe.block(i), i == 0 ? blockIdx.x : pipe.block(i - 1).index);
  pipe.blocks().arrive_full(i);
}

// One lane's work for each consumer: turns. A counter of each 64 rows of dQ and consumer tells
// which block of keys is next to add to them, from the last that their queries see down to the
// first.
template <class Cfg>
__device__ inline void keep_turns(const BackwardParams& params, const BackwardPipeline<Cfg>& pipe,
                                  int consumer) {
  constexpr int kCountersOfBlock = Cfg::kBlockM / kSumRows * 2;
  const auto ring = pipe.turns(consumer);
  uint32_t step = 0;
  for (uint32_t i = 0;; ++i) {
    pipe.blocks().wait_full(i);
    const KeyBlock& block = pipe.block(i);
    if (block.is_last) return;
    const int turn = block.first / Cfg::kBlockN;
    const int group = params.hq / params.hk;
    for (int head = 0; head < group; ++head) {
      // With two tiles of rows a step, each consumer adds to one.
      int32_t* counter = params.turns +
                         (block.first_sum + head * params.delta_head) / kSumRows * 2 +
                         consumer * (kCountersOfBlock - 1) + block.begin * kCountersOfBlock;
      for (int m = block.begin; m < block.end; ++m, ++step, counter += kCountersOfBlock) {
        ptx::wait_until_equal(counter, turn);
        ring.arrive_full(step);
        ring.wait_empty(step + 1);
        ptx::red_release_add(counter, -1);
      }
    }
    pipe.blocks().arrive_empty(i);
  }
}

// One lane's work: for each block of keys K, V, and Q, dO, lse and delta of its steps.
template <class Cfg>
__device__ inline void load_steps(const TmaBackwardParams& params,
                                  const BackwardPipeline<Cfg>& pipe) {
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  constexpr int kPanels = TileQ::kCols / 64;
  constexpr int kStatisticsBytes = Cfg::kBlockM * 2 * 4;
  const BackwardParams& call = params.call;
  uint32_t step = 0;
  for (uint32_t i = 0;; ++i) {
    pipe.blocks().wait_full(i);
    const KeyBlock& block = pipe.block(i);
    if (block.is_last) return;
    const auto load_values = [&] {
      load_tile<TileK>(pipe.v_buffer(), params.v, pipe.values().full(i), kPanels,
                       block.first_k + block.first, block.head, block.batch_k);
    };
    pipe.keys().wait_empty(i);
    load_tile<TileK>(pipe.k_buffer(), params.k, pipe.keys().full(i), kPanels,
                     block.first_k + block.first, block.head, block.batch_k);
    if (block.begin >= block.end) load_values();
    const int group = call.hq / call.hk;
    for (int head = block.head * group; head < (block.head + 1) * group; ++head) {
      const float* statistics =
          call.statistics +
          2 * attn::PaddedRows(call, block.sequence, head, call.statistics_head).first;
      for (int m = block.begin; m < block.end; ++m, ++step) {
        const int row = block.first_q + m * Cfg::kBlockM;
        const uint32_t full = pipe.queries().full(step);
        pipe.queries().wait_empty(step);
        load_tile<TileQ>(pipe.q_buffer(step), params.q, full, kPanels, row, head, block.batch_q,
                         kStatisticsBytes);
        ptx::bulk_load(pipe.statistics(step), statistics + 2 * m * Cfg::kBlockM, kStatisticsBytes,
                       full);
        if (head == block.head * group && m == block.begin) load_values();
        load_tile<TileQ>(pipe.dout_buffer(step), params.dout, pipe.douts().full(step), kPanels, row,
                         head, block.batch_q);
      }
    }
    pipe.blocks().arrive_empty(i);
  }
}

}  // namespace flash::sm90
