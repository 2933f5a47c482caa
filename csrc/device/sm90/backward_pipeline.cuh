// Shared memory of a CTA of the backward kernel: buffers, the barriers that guard them, and the
// blocks of keys it works on.
#pragma once

#include "attn/sequence.cuh"
#include "ptx/tma.cuh"
#include "sm90/pipeline.cuh"

namespace flash::sm90 {

// `kValueDim`: columns of V and dO.
template <class T_, int kHeadDim_, int kValueDim_ = kHeadDim_>
struct BackwardConfig {
  using T = T_;
  static constexpr BackwardTile kTile = backward_tile(kHeadDim_);
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages;
  static constexpr bool kByKeys = kTile.share == sm90::kByKeys;
  static constexpr bool kHasSummer = kTile.has_summer;
  static constexpr int kSenders = kTile.senders();
  static constexpr int kOutBuffers = kTile.out_buffers();
  static_assert(kBlockN == (kByKeys ? 128 : 64), "a product of a warpgroup has 64 rows");
  using TileQ = tile::SmemTile<kBlockM, kTile.columns()>;
  using TileK = tile::SmemTile<kBlockN, kTile.columns()>;
  using TileDs = tile::SmemTile<kBlockM, kBlockN>;
  using TileOut = tile::SmemTile<64, kTile.columns()>;  // 64 rows of dK or dV
  using AccS = tile::Accumulators<1, 8>;                // of 64 keys and 64 queries
  using AccK = tile::Accumulators<1, kHeadDim / 8>;
  using AccV = tile::Accumulators<1, kValueDim / 8>;
};

// What one round of the CTA computes: dK and dV of kBlockN keys of one key-value head. A warp plans
// it, everyone else reads it. Its steps are, for each query head of the group, the blocks of
// queries [begin, end).
struct KeyBlock {
  int is_last;     // there are no more
  uint32_t index;  // in the order of blocks
  int sequence, head;
  int first_head, end_head;  // query heads of the group
  int first;                 // key
  int sq, sk;
  int begin, end;
  int start;  // the first of these: behind the last comes `begin`
  // All of these blocks' queries belong to the sequence, and see all of a consumer's keys.
  int full_begin[2], full_end[2];
  // Where rows stand in the tensor maps.
  int first_q, batch_q;
  int first_k, batch_k;
  // Rows of the sequence's last block that may be used; those behind belong to others.
  int tail_q, tail_k;
  // The row in dq_accum of the first query of the group's first head. Memory has less than 2^31.
  int first_sum;
};

__device__ inline int num_steps(const KeyBlock& block) {
  return (block.end - block.begin) * (block.end_head - block.first_head);
}

// The rows of a backward call's sequence, and where they stand in the tensor maps.
template <class Block>
__device__ inline void place_sequence(Block& block, const Sequences& seqs,
                                      const attn::Sequence& seq) {
  block.sq = seq.sq;
  block.sk = seq.sk;
  block.first_q = static_cast<int>(seq.first_q);
  block.batch_q = seqs.cu_seqlens_q ? 0 : seq.index;
  block.first_k = static_cast<int>(seq.first_k);
  block.batch_k = seqs.cu_seqlens_k ? 0 : seq.index;
}

// Whether the delta kernel leaves sums of dQ to blocks of keys (BackwardParams::heads_zeroed); how
// many blocks a section has; and how many of these zero sums of the next one: the first half, so
// that blocks that are taken at one time seldom wait for each other.
template <class Cfg>
__device__ inline bool leaves_zeros(const BackwardParams& params) {
  return Cfg::kByKeys && !params.turns && params.heads_zeroed < params.hk * params.seqs.b;
}
template <class Cfg>
__device__ inline int blocks_of_section(const BackwardParams& params) {
  return params.heads_per_section * ((params.seqs.sk + Cfg::kBlockN - 1) / Cfg::kBlockN);
}
template <class Cfg>
__device__ inline int blocks_that_zero(const BackwardParams& params) {
  return (blocks_of_section<Cfg>(params) + 1) / 2;
}

//   keys, values:    full: TMA has brought them       empty: no product needs them any more, and
//                                                     what left through them is gone
//   queries, douts:  full: TMA has brought the block  empty (queries only): all warps are done
//   gradients:       full: dS is there                empty: dQ of it is multiplied
//   outs:            full: the consumer has written   empty: TMA has read it
//                    its part of dQ, or dV
//   blocks:          full: it has been planned        empty: everyone is done with it
//   loads:           full: but for the last step's    (nobody waits until it is empty)
//                    all of a block have begun
//
// Outs, a ring for each buffer, are there where consumers have keys of their own; gradients where a
// third one multiplies dQ. Then there is one buffer, and a ring of two entries, one for each
// sender.
template <class Cfg>
struct BackwardPipeline {
  static constexpr int kBlocks = 2;
  static constexpr int kKeyBuffers = Cfg::kTile.key_buffers();
  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + kKeyBuffers * Cfg::TileK::kBytes;
  static constexpr int kQueries = kValues + Cfg::TileK::kBytes;
  static constexpr int kDs = kQueries + 2 * Cfg::kStages * Cfg::TileQ::kBytes;
  static constexpr int kP = kDs + 2 * Cfg::kTile.ds_bytes();
  static constexpr int kOuts = kP + 2 * Cfg::kTile.p_bytes();
  static constexpr int kStatistics = kOuts + Cfg::kOutBuffers * Cfg::kTile.out_bytes();
  static constexpr int kBounds = kStatistics + Cfg::kTile.statistics_bytes();
  static constexpr int kZeros = kBounds + Cfg::kTile.bounds_bytes();
  static constexpr int kBarriers = kZeros + Cfg::kTile.zeros_bytes();
  using KeyRing = Ring<kKeyBuffers>;
  using ValueRing = Ring<1>;
  using QueryRing = Ring<Cfg::kStages>;
  using GradientRing = Ring<2>;
  using OutRing = Ring<1 + Cfg::kHasSummer>;
  using BlockRing = Ring<kBlocks>;
  using LoadRing = Ring<1>;
  static constexpr int kRecords = kBarriers + KeyRing::kBytes + ValueRing::kBytes +
                                  2 * QueryRing::kBytes + BlockRing::kBytes +
                                  Cfg::kOutBuffers * OutRing::kBytes + LoadRing::kBytes +
                                  Cfg::kHasSummer * GradientRing::kBytes;
  static_assert(kRecords % alignof(KeyBlock) == 0 &&
                    kRecords + kBlocks * sizeof(KeyBlock) <= Cfg::kTile.smem_bytes(),
                "room behind the buffers");

  unsigned char* storage;
  uint32_t smem;

  __device__ explicit BackwardPipeline(unsigned char* storage)
      : storage(storage), smem(ptx::smem_address(storage)) {}

  // Of blocks of keys that are loaded, counted from the start.
  __device__ uint32_t k_buffer(uint32_t i) const {
    return smem + kKeys + i % kKeyBuffers * Cfg::TileK::kBytes;
  }
  __device__ uint32_t v_buffer() const { return smem + kValues; }
  __device__ uint32_t q_buffer(uint32_t step) const {
    return smem + kQueries + step % Cfg::kStages * (2 * Cfg::TileQ::kBytes);
  }
  __device__ uint32_t dout_buffer(uint32_t step) const {
    return q_buffer(step) + Cfg::TileQ::kBytes;
  }
  __device__ uint32_t ds_buffer(uint32_t step) const {
    return smem + kDs + step % 2 * Cfg::kTile.ds_bytes();
  }
  __device__ uint32_t p_buffer(uint32_t step) const {
    return smem + kP + step % 2 * Cfg::kTile.p_bytes();
  }
  // Where dQ and dV leave, or else dV through V and dK through K.
  __device__ uint32_t out_buffer(int i) const {
    return Cfg::kByKeys ? smem + kOuts + i * Cfg::kTile.out_bytes()
           : i == 0     ? v_buffer()
                        : k_buffer(0);
  }
  // Of each 64 queries of a block, 64 lse and 64 delta.
  __device__ uint32_t statistics(uint32_t step) const {
    return smem + kStatistics + step % Cfg::kStages * (Cfg::kBlockM * 2 * 4);
  }

  // The first query that sees a key, and the one behind the last.
  __device__ uint32_t bounds(int key) const { return smem + kBounds + key * 8; }
  __device__ uint32_t zeros() const { return smem + kZeros; }

  __device__ KeyRing keys() const { return {smem + kBarriers}; }
  __device__ ValueRing values() const { return {keys().barriers + KeyRing::kBytes}; }
  __device__ QueryRing queries() const { return {values().barriers + ValueRing::kBytes}; }
  __device__ QueryRing douts() const { return {queries().barriers + QueryRing::kBytes}; }
  __device__ BlockRing blocks() const { return {douts().barriers + QueryRing::kBytes}; }
  __device__ OutRing outs(int i) const {
    return {blocks().barriers + BlockRing::kBytes + i * OutRing::kBytes};
  }
  __device__ LoadRing loads() const { return {outs(Cfg::kOutBuffers).barriers}; }
  __device__ GradientRing gradients() const { return {loads().barriers + LoadRing::kBytes}; }
  __device__ KeyBlock& block(uint32_t i) const {
    return reinterpret_cast<KeyBlock*>(storage + kRecords)[i % kBlocks];
  }

  // By all threads.
  __device__ void init() const {
    if (threadIdx.x < Cfg::kTile.zeros_bytes() / sizeof(uint4)) {
      reinterpret_cast<uint4*>(storage + kZeros)[threadIdx.x] = make_uint4(0, 0, 0, 0);
      ptx::fence_async_proxy();
    }
    if (threadIdx.x == 0) {
      keys().init(1, 4 * (Cfg::kConsumers + Cfg::kHasSummer));
      values().init(1, 4 * Cfg::kConsumers);
      queries().init(1, 4 * Cfg::kConsumers);
      douts().init(1, Cfg::kConsumers);
      for (int i = 0; i < Cfg::kOutBuffers; ++i) outs(i).init(4, 1);
      blocks().init(1, 1 + Cfg::kConsumers + Cfg::kHasSummer + Cfg::kSenders);
      loads().init(1, 1);
      if (Cfg::kHasSummer) gradients().init(4 * Cfg::kConsumers, 4);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
  }
};

}  // namespace flash::sm90
