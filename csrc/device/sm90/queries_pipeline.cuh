// The kernel of dQ: shared memory of a CTA, which blocks of queries it works on, and its loads.
#pragma once

#include "sm90/backward_pipeline.cuh"
#include "sm90/producer.cuh"

namespace flash::sm90 {

// `kValueDim`: columns of V and dO.
template <class T_, int kHeadDim_, int kValueDim_ = kHeadDim_>
struct QueriesConfig {
  using T = T_;
  static constexpr QueriesTile kTile = queries_tile(kHeadDim_);
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kBlockM = kTile.block_m();
  static constexpr int kBlockN = kTile.block_n;
  using TileQ = tile::SmemTile<kBoxM, kTile.columns()>;  // of a consumer
  using TileK = tile::SmemTile<kBlockN, kTile.columns()>;
  using AccS = tile::Accumulators<1, kBlockN / 8>;
  using AccQ = tile::Accumulators<1, kHeadDim / 8>;
};

// What one round of the CTA computes: dQ of kBlockM queries of one head. A warp plans it, everyone
// else reads it. Its steps are the blocks of keys [begin, end).
struct QueryBlock {
  int is_last;  // there are no more
  int sequence, head, head_k;
  int first;  // query
  int sq, sk;
  int begin, end;
  // Of each consumer: where the keys end that its queries see, and which blocks all of them see.
  int end_of[2], full_begin[2], full_end[2];
  // Where rows stand in the tensor maps.
  int first_q, batch_q;
  int first_k, batch_k;
  int tail_k;  // rows of the sequence's last block; those behind belong to others, or it is 0
};

//   q, dout:  full: TMA has brought a consumer's rows   empty: it needs them no more
//   k, v:     full: TMA has brought the block           empty: both consumers are done with it
//   blocks:   full: it has been planned                 empty: everyone is done with it
//   loads:    full: but for the last step's all of a    (nobody waits until it is empty)
//             block have begun
template <class Cfg>
struct QueriesPipeline {
  static constexpr int kBlocks = 2;
  static constexpr int kDouts = Cfg::kConsumers * Cfg::TileQ::kBytes;
  static constexpr int kKeys = 2 * kDouts;
  static constexpr int kValues = kKeys + Cfg::kTile.k_stages * Cfg::TileK::kBytes;
  static constexpr int kBarriers = kValues + Cfg::kTile.v_stages * Cfg::TileK::kBytes;
  using QRing = Ring<1>;
  using KRing = Ring<Cfg::kTile.k_stages>;
  using VRing = Ring<Cfg::kTile.v_stages>;
  using BlockRing = Ring<kBlocks>;
  using LoadRing = Ring<1>;
  static constexpr int kRecords = kBarriers + 2 * Cfg::kConsumers * QRing::kBytes + KRing::kBytes +
                                  VRing::kBytes + BlockRing::kBytes + LoadRing::kBytes;
  static_assert(kRecords % alignof(QueryBlock) == 0 &&
                    kRecords + kBlocks * sizeof(QueryBlock) <= Cfg::kTile.smem_bytes(),
                "room behind the buffers");

  unsigned char* storage;
  uint32_t smem;

  __device__ explicit QueriesPipeline(unsigned char* storage)
      : storage(storage), smem(ptx::smem_address(storage)) {}

  __device__ uint32_t q_buffer(int consumer) const { return smem + consumer * Cfg::TileQ::kBytes; }
  __device__ uint32_t dout_buffer(int consumer) const { return q_buffer(consumer) + kDouts; }
  __device__ uint32_t k_buffer(uint32_t step) const {
    return smem + kKeys + step % Cfg::kTile.k_stages * Cfg::TileK::kBytes;
  }
  __device__ uint32_t v_buffer(uint32_t step) const {
    return smem + kValues + step % Cfg::kTile.v_stages * Cfg::TileK::kBytes;
  }

  __device__ QRing q(int consumer) const { return {smem + kBarriers + consumer * QRing::kBytes}; }
  __device__ QRing dout(int consumer) const { return q(Cfg::kConsumers + consumer); }
  __device__ KRing k() const { return {q(2 * Cfg::kConsumers).barriers}; }
  __device__ VRing v() const { return {k().barriers + KRing::kBytes}; }
  __device__ BlockRing blocks() const { return {v().barriers + VRing::kBytes}; }
  __device__ LoadRing loads() const { return {blocks().barriers + BlockRing::kBytes}; }
  __device__ QueryBlock& block(uint32_t i) const {
    return reinterpret_cast<QueryBlock*>(storage + kRecords)[i % kBlocks];
  }

  // By all threads.
  __device__ void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Cfg::kConsumers; ++i) {
        q(i).init(1, 1);
        dout(i).init(1, 1);
      }
      k().init(1, Cfg::kConsumers);
      v().init(1, Cfg::kConsumers);
      blocks().init(1, Cfg::kConsumers + 1);
      loads().init(1, 1);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
  }
};

__device__ inline void find_steps(QueryBlock& block, const BackwardParams& params, int block_n) {
  const attn::Mask mask(params.scores, block.sq, block.sk);
  block.begin = mask.lowest(block.first) / block_n;
  block.end = block.begin;
#pragma unroll 1
  for (int consumer = 0; consumer < 2; ++consumer) {
    const int own = block.first + kBoxM * consumer;
    const int last = min(own + kBoxM, block.sq) - 1;
    const int end = last < own ? 0 : (max(mask.highest(last), 0) + block_n - 1) / block_n;
    block.end_of[consumer] = max(end, block.begin);
    block.end = max(block.end, end);
    block.full_begin[consumer] = (mask.lowest(last) + block_n - 1) / block_n;
    block.full_end[consumer] = max(mask.highest(own), 0) / block_n;
  }
  // Behind the last row of K and V there are zeros; behind a sequence there is anything.
  const Sequences& seqs = params.seqs;
  const int room = seqs.cu_seqlens_k ? seqs.total_k - block.first_k : seqs.sk;
  block.tail_k = block.sk < room ? block.sk % block_n : 0;
}

// Block `index`, or that there are no more. Blocks come in sections of heads, long ones first, as
// tiles of the forward kernel do. False: it has no queries.
template <class Cfg>
__device__ inline bool find_query_block(QueryBlock& block, const BackwardParams& params,
                                        uint32_t index) {
  const uint32_t num_blocks = (params.seqs.sq + Cfg::kBlockM - 1) / Cfg::kBlockM;
  block.is_last = index >= num_blocks * params.hq * params.seqs.b;
  if (block.is_last) return true;
  const uint32_t group = static_cast<uint32_t>(params.hq) / static_cast<uint32_t>(params.hk);
  const attn::TileIndex at(index, num_blocks, params.hq, params.seqs.b,
                           params.heads_per_section * group);
  block.sequence = at.sequence;
  block.head = at.head;
  block.first = at.block_m * Cfg::kBlockM;
  ptx::forget();  // what is in the block by now: registers are few
  block.head_k = attn::key_head(block.head, params.hq, params.hk);
  place_sequence(block, params.seqs, attn::Sequence(params.seqs, block.sequence));
  if (block.first >= block.sq) return false;
  ptx::forget();
  find_steps(block, params, Cfg::kBlockN);
  return true;
}

// One lane's work: what the CTA does in each round. No block is taken before the one in front is
// about to end: another CTA may be free sooner.
template <class Cfg>
__device__ inline void plan_query_blocks(const BackwardParams& params,
                                         const QueriesPipeline<Cfg>& pipe) {
  const auto next = [&] {
    if (params.next_block == nullptr) return ~0u;
    return gridDim.x + static_cast<uint32_t>(ptx::atomic_add(params.next_block + 1, 1));
  };
  uint32_t index = blockIdx.x;
  for (int i = 0;; ++i) {
    const auto again = [&] { return ptx::opaque(i); };  // so that nothing made of it is kept
    QueryBlock& block = pipe.block(i);
    pipe.blocks().wait_empty(i);
    while (!find_query_block<Cfg>(block, params, index)) index = next();
    pipe.blocks().arrive_full(again());
    if (block.is_last) return;
    pipe.loads().wait_full(again());
    index = next();
  }
}

// One lane's work: for each block of queries Q and dO, and K and V of its steps.
template <class Cfg>
__device__ inline void load_key_steps(const TmaBackwardParams& params,
                                      const QueriesPipeline<Cfg>& pipe) {
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  constexpr int kPanels = TileK::kCols / 64;
  constexpr int kPanelsOfV = (Cfg::kValueDim + 63) / 64;
  uint32_t step = 0;
  uint32_t round = 0;  // of those that have steps
  for (uint32_t i = 0;; ++i) {
    pipe.blocks().wait_full(i);
    const QueryBlock& block = pipe.block(i);
    if (block.is_last) return;
    for (int j = block.begin; j < block.end; ++j, ++step) {
      const int key = block.first_k + j * Cfg::kBlockN;
      const bool is_first = j == block.begin;
      pipe.loads().arrive_full_if(j + 1 == block.end, i);
      const auto load_rows = [&](const TensorMap& map, int consumer, uint32_t to, uint32_t full,
                                 int num_panels) {
        load_tile<TileQ>(to, map, full, num_panels, block.first_q + block.first + kBoxM * consumer,
                         block.head, block.batch_q);
      };
#pragma unroll 1
      for (int c = 0; is_first && c < Cfg::kConsumers; ++c) {
        pipe.q(c).wait_empty(round);
        load_rows(params.q, c, pipe.q_buffer(c), pipe.q(c).full(round), kPanels);
      }
      pipe.k().wait_empty(step);
      load_tile<TileK>(pipe.k_buffer(step), params.k, pipe.k().full(step), kPanels, key,
                       block.head_k, block.batch_k);
#pragma unroll 1
      for (int c = 0; is_first && c < Cfg::kConsumers; ++c) {
        pipe.dout(c).wait_empty(round);
        load_rows(params.dout, c, pipe.dout_buffer(c), pipe.dout(c).full(round), kPanelsOfV);
      }
      pipe.v().wait_empty(step);
      load_tile<TileK>(pipe.v_buffer(step), params.v, pipe.v().full(step), kPanelsOfV, key,
                       block.head_k, block.batch_k);
    }
    if (block.begin < block.end) ++round;
    pipe.loads().arrive_full_if(block.begin >= block.end, i);
    pipe.blocks().arrive_empty(i);
  }
}

}  // namespace flash::sm90
