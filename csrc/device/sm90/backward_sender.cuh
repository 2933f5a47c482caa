// How gradients leave shared memory by TMA: sums of dQ, and 64 rows of dK or dV.
#pragma once

#include "ptx/tma.cuh"
#include "sm90/backward_pipeline.cuh"
#include "tile/store.cuh"

namespace flash::sm90 {

// Whether 64 rows of a gradient of keys, from `first` of the sequence on, leave by TMA: rows behind
// a packed sequence belong to another one.
__device__ inline bool leave_by_tma(const BackwardParams& params, const KeyBlock& block,
                                    int first) {
  return params.seqs.cu_seqlens_k == nullptr || first + 64 <= block.sk;
}

template <class TileOut>
__device__ inline void send_rows(const TensorMap& map, uint32_t smem, const KeyBlock& block,
                                 int first, int num_cols) {
#pragma unroll
  for (int panel = 0; panel < TileOut::kCols / 64; ++panel) {
    if (panel * 64 < num_cols) {
      ptx::tma_store(map, smem + panel * TileOut::kPanelBytes, panel * 64, block.first_k + first,
                     block.head, block.batch_k);
    }
  }
  ptx::tma_store_commit();
}

// One lane's work: what leaves through a buffer. Of each step dQ is added to the sums in memory: a
// consumer's part, a step late, as it is multiplied, then that one's dV of each block; or, if dQ
// has a consumer, all of it, by two senders that have every second step.
//
// Where sums are not zeroed, who comes first stores. A state of each 64 rows of dQ, or of half of
// their columns, tells who that is, and when the others may add (BackwardParams::turns). Who has
// claimed to be first has its sums at hand: it waits for nobody any more, so nobody waits forever.
//
// Where sums have one order, the state tells which block of keys is next to add to them, from the
// last that their queries see down to the first. An addition, the fence behind it and a look at a
// state, one after the other, take longer than some steps: so who has all steps looks at the next
// state beside each addition.
template <class Cfg>
struct Sender {
  static constexpr bool kByRows = Cfg::kBlockM == 2 * kSumRows;  // else by columns
  static constexpr int kColumns = Cfg::kHasSummer ? Cfg::kHeadDim : 64;
  static constexpr int kNone = -(1 << 30);  // no row, no turn
  const TmaBackwardParams& maps;
  const BackwardPipeline<Cfg>& pipe;
  const int sender;

  __device__ void run() const {
    const BackwardParams& call = maps.call;
    uint32_t sent = 0;
    // Of the step before, if there is one: the row in dq_accum, its turn, and its state at a look.
    int late = kNone;
    int late_turn = 0;
    int seen = kNone;
    int uncounted = kNone;  // the key-value head of the block before, until its last dQ has left
    ptx::wait_for_kernel_in_front();
    for (int i = 0;; ++i) {
      pipe.blocks().wait_full(i);
      const KeyBlock& block = pipe.block(i);
      const bool has_steps = !block.is_last && block.begin < block.end;
      // Behind the last block there is only the late dQ.
      int left = has_steps ? num_steps(block) : block.is_last;
      int at = block.start;
      int row = has_steps ? first_row(block) : 0;
      for (; left > 0; --left) {
        if (late != kNone) {
          if (has_all_steps() || sent % 2 == sender) add(late, late_turn, seen, row, sent);
          ++sent;
          count(uncounted);
          uncounted = kNone;
        }
        late = row;
        late_turn = block.first / Cfg::kBlockN;
        row += Cfg::kBlockM;
        if (++at == block.end) {
          at = block.begin;
          row -= (block.end - at) * Cfg::kBlockM;
        }
        if (at == block.start) row += static_cast<int>(call.delta_head);
      }
      if (block.is_last) break;
      const int head = block.sequence * call.hk + block.head;
      if (has_steps) {
        if constexpr (has_all_steps()) {
          outs().wait_full(sent);
          send_values(block);
          outs().arrive_empty(sent++);
        }
        uncounted = head;
      } else {
        count(head);
      }
      pipe.blocks().arrive_empty(ptx::opaque(i));  // so that no address is kept
    }
    ptx::tma_store_wait();
  }

 private:
  __device__ static constexpr bool has_all_steps() { return !Cfg::kHasSummer; }
  __device__ int buffer() const { return has_all_steps() ? sender : 0; }
  __device__ auto outs() const { return pipe.outs(buffer()); }

  // Counts a block of keys of a head: its dQ has left. Who sees that sees the sums.
  __device__ void count(int head) const {
    if (head == kNone) return;
    ptx::tma_store_wait();
    ptx::red_release_add(maps.call.finished + head, 1);
  }

  __device__ void send_values(const KeyBlock& block) const {
    const int first = block.first + 64 * sender;
    if (!leave_by_tma(maps.call, block, first)) return;
    send_rows<typename Cfg::TileOut>(maps.dv, pipe.out_buffer(buffer()), block, first,
                                     maps.call.dv);
    ptx::tma_store_wait_read();
  }

  __device__ int first_row(const KeyBlock& block) const {
    return block.first_sum + block.start * Cfg::kBlockM + (kByRows ? kSumRows * sender : 0);
  }

  // To 64 rows from `row` of dq_accum on, and looks at the state of those from `next` on. Nothing
  // is read behind that look, and additions take place in L2, behind those that the state tells of:
  // so it needs no order of its own.
  __device__ void add(int row, int turn, int& seen, int next, uint32_t sent) const {
    const bool has_states = maps.call.turns;
    const bool is_in_turn = maps.call.deterministic;
    int32_t* const state = state_of(row);
    if (is_in_turn && seen != turn) seen = ptx::wait_until_either(state, turn, ~turn);
    if (has_states && !is_in_turn && !has_all_steps()) seen = ptx::ld_relaxed(state);
    outs().wait_full(sent);
    const bool is_first =
        has_states && (is_in_turn ? seen != turn : seen != kSumsAreThere && claim(state));
    start_sending(row, is_first);
    seen = has_states && has_all_steps() ? ptx::ld_relaxed(state_of(next)) : kNone;
    ptx::tma_store_wait_read();
    outs().arrive_empty(sent);
    if (is_in_turn || is_first) {
      ptx::tma_store_wait();
      const int next_turn = turn - 1;
      ptx::red_release_add(state, !is_in_turn ? kSumsAreThere - kSomeoneStores
                                  : is_first  ? next_turn - ~turn
                                              : next_turn - turn);
    }
  }
  // Sums that are at hand, to be stored. False: someone has stored some, they are to be added.
  __device__ static bool claim(int32_t* state) {
    const int before = ptx::atomic_compare_exchange(state, kNothingIsThere, kSomeoneStores);
    if (before == kSomeoneStores) ptx::wait_until_equal(state, kSumsAreThere);
    return before == kNothingIsThere;
  }
  __device__ void start_sending(int row, bool is_first) const {
    const int column = kByRows ? 0 : 64 * ptx::opaque(buffer());  // so that no address is kept
    float* const to = maps.call.dq_accum + int64_t{row} * Cfg::kHeadDim +
                      column / 8 * tile::WarpgroupOrder::kEightColumns;
    const int bytes =
        min(Cfg::kHeadDim - column, kColumns) * kSumRows * static_cast<int>(sizeof(float));
    if (is_first) {
      ptx::bulk_store(to, pipe.out_buffer(buffer()), bytes);
    } else {
      ptx::bulk_add(to, pipe.out_buffer(buffer()), bytes);
    }
    ptx::tma_store_commit();
  }
  __device__ int32_t* state_of(int row) const {
    return maps.call.turns + static_cast<uint32_t>(row) / kSumRows * 2 + (kByRows ? 0 : buffer());
  }
};

}  // namespace flash::sm90
