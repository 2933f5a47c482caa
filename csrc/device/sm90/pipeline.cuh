// Shared memory of a CTA: buffers, the barriers that guard them, and the tiles it works on.
#pragma once

#include "attn/mask.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/config.h"
#include "tile/accumulators.cuh"

namespace flash::sm90 {

// What O is rounded to, and the bytes of an element of Q, K and V.
template <class T>
struct Element {
  using Out = T;
  static constexpr int kBytes = 2;
};
template <>
struct Element<ptx::E4m3> {
  using Out = ptx::Bfloat16;
  static constexpr int kBytes = 1;
};

template <class T_, int kHeadDim_, Serves kServes>
struct ForwardConfig {
  using T = T_;
  using Out = typename Element<T>::Out;
  static constexpr int kElementBytes = Element<T>::kBytes;
  static constexpr bool kIsFp8 = kElementBytes == 1;
  static constexpr ForwardTile kTile = forward_tile(kServes, kHeadDim_, kElementBytes);
  static constexpr bool kMayPair = kTile.may_pair();
  static constexpr bool kPairsHeads = false;  // but rows
  static constexpr bool kIsPlain = kServes != kAll;
  // Keys may be cut into parts, and rows of a group's heads may share a tile.
  static constexpr bool kServesAll = !kIsPlain && !kIsFp8;
  static constexpr int kConsumers = kTile.consumers;
  static constexpr int kBlockM = kTile.block_m();
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kTile.value_dim();
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages;
  static constexpr int kQBuffers = kTile.q_buffers;
  static constexpr bool kIsJoined = kTile.is_joined();
  static constexpr bool kHasOBuffer = kTile.has_o_buffer();
  // The depths of Q K^T and of P V in elements of 16 bits.
  static constexpr int kDepth = kHeadDim * kElementBytes / 2;
  static constexpr int kDepthOfP = kBlockN * kElementBytes / 2;
  using TileQ = tile::SmemTile<64, kTile.columns()>;  // of one consumer
  using TileO = tile::SmemTile<64, kTile.o_columns()>;
  using TileK = tile::SmemTile<kBlockN, kTile.columns()>;
  using TileV = tile::SmemTile<kBlockN, kTile.v_in_columns()>;
  // V by columns, where it is transposed.
  using TileVt = tile::SmemTile<kTile.v_columns(), (kDepthOfP + 63) / 64 * 64>;
  using AccS = tile::Accumulators<1, kBlockN / 8>;
  using AccO = tile::Accumulators<1, kValueDim / 8>;
};

constexpr int kMaxConsumers = 4;

// What one round of the CTA computes: kBlockM rows of one head. The planner writes it, everyone
// else reads it.
struct Tile {
  int begin, end;  // blocks of keys, at least one; end 0: there are no more tiles
  // Blocks that this CTA or the other of its pair takes, and those that both do.
  attn::Keys of_pair, shared;
  attn::Keys seen_by_all[kMaxConsumers];  // what all rows of a consumer see
  // Of the last blocks: none of the consumer's rows sees them. Where the tile skips_blocks().
  int skipped[kMaxConsumers];
  int row0;  // of the sequence's queries
  int tail;  // rows of the last block of V that may be used; those behind belong to others
  int sequence, head;
  int sq, sk;
  // Where rows stand in the tensor maps.
  int first_q, batch_q;
  int first_k, batch_k, head_k;
};

// The same of kernels that serve all calls.
template <bool kServesAll>
struct TileOf : Tile {};
template <>
struct TileOf<true> : Tile {
  int split;         // which part of the keys
  int queries;       // of a consumer: its 64 rows are those of several heads, one behind the other
  uint32_t inverse;  // a row times this, over 2^16, is its head
};

// What products of 8-bit elements must be multiplied by.
struct Descale {
  float qk, v;
};

// A ring of buffers. Entry i, counted from the start of the kernel, is in buffer i % kSize; each
// buffer has a barrier that tells when it is full and one that tells when it may be overwritten. Of
// kSize a power of two, i may pass 2^32.
template <int kSize>
struct Ring {
  static constexpr int kBytes = kSize * 16;
  uint32_t barriers;

  __device__ uint32_t full(uint32_t i) const { return barriers + i % kSize * 8; }
  __device__ uint32_t empty(uint32_t i) const { return full(i) + kSize * 8; }

  __device__ void init(int full_count, int empty_count) const {
    for (int i = 0; i < kSize; ++i) {
      ptx::mbarrier_init(full(i), full_count);
      ptx::mbarrier_init(empty(i), empty_count);
    }
  }
  __device__ void wait_full(uint32_t i) const { ptx::mbarrier_wait(full(i), i / kSize & 1); }
  // The first time round, buffers are empty as they are.
  __device__ void wait_empty(uint32_t i) const {
    ptx::mbarrier_wait(empty(i), (i / kSize & 1) ^ 1);
  }
  __device__ bool is_full(uint32_t i) const {
    return ptx::mbarrier_has_ended(full(i), i / kSize & 1);
  }
  __device__ void arrive_full(uint32_t i) const { ptx::mbarrier_arrive(full(i)); }
  __device__ void arrive_full_if(bool is_due, uint32_t i) const {
    ptx::mbarrier_arrive_if(is_due, full(i));
  }
  __device__ void arrive_empty(uint32_t i) const { ptx::mbarrier_arrive(empty(i)); }
  __device__ void arrive_empty_if(bool is_due, uint32_t i) const {
    ptx::mbarrier_arrive_if(is_due, empty(i));
  }
};

//   q:     full: TMA has brought Q           empty: its consumer has read it for the last time
//   o:     full: its consumer has written    empty: TMA has taken O from there, and the
//          O and the log-sum-exp                    log-sum-exp has been read
//   k, v:  full: TMA has brought the block   empty: all consumers are done with it
//   v_in:  full: TMA has brought the block   empty: it stands transposed in v, whose full is that;
//          of 16-bit elements v itself
//   tiles: full: the planner has written     empty: all of its O is there, and it has been loaded
//   begun: full: its loads have begun        (nobody waits until it is empty)
//   next:  full: the other CTA of the pair   empty: the planner has read it
//          has sent the next tile's number
//
// Of a pair, entries of k and v are the same blocks in both CTAs: where one has no use for a block,
// its entry is full as it is.
template <class Cfg>
struct Pipeline {
  static constexpr int kTiles = 4;
  static constexpr int kConsumers = Cfg::kConsumers;
  static constexpr int kTransposers = 2;  // warps
  static constexpr int kQBytes = Cfg::kQBuffers * kConsumers * Cfg::TileQ::kBytes;
  static constexpr int kOBytes = kConsumers * Cfg::TileO::kBytes;
  static constexpr int kKBytes = Cfg::kStages * Cfg::TileK::kBytes;
  static constexpr int kVBytes = Cfg::kStages * Cfg::TileV::kBytes;
  static constexpr int kValues = kQBytes + kOBytes + kKBytes;
  static constexpr int kLses = kValues + kVBytes + Cfg::kTile.transposed_bytes();
  static constexpr int kBarriers = kLses + Cfg::kBlockM * 8;
  using QRing = Ring<Cfg::kQBuffers>;
  using ORing = Ring<1>;
  using KRing = Ring<Cfg::kStages>;
  using TileRing = Ring<kTiles>;
  using AnyTile = TileOf<Cfg::kServesAll>;
  static constexpr int kTileRecords = kConsumers * (QRing::kBytes + ORing::kBytes) +
                                      (2 + Cfg::kIsFp8) * KRing::kBytes + 2 * TileRing::kBytes;
  static constexpr int kRecordBytes = 128;  // a power of two takes no multiplication
  static_assert(sizeof(AnyTile) <= kRecordBytes, "a record has room");
  static constexpr int kNextTiles = kTileRecords + kTiles * kRecordBytes;
  static constexpr int kDescales = kNextTiles + Cfg::kMayPair * (TileRing::kBytes + 4 * kTiles);
  static_assert(kDescales + Cfg::kIsFp8 * kTiles * sizeof(Descale) <= 1024, "room at the end");

  unsigned char* storage;
  uint32_t smem;

  __device__ explicit Pipeline(unsigned char* storage)
      : storage(storage), smem(ptx::smem_address(storage)) {}

  __device__ uint32_t q_buffer(uint32_t tile, int consumer) const {
    return smem + (tile % Cfg::kQBuffers * kConsumers + consumer) * Cfg::TileQ::kBytes;
  }
  __device__ uint32_t o_buffer(int consumer) const {
    return smem + kQBytes + consumer * Cfg::TileO::kBytes;
  }
  __device__ uint32_t k_buffer(uint32_t block) const {
    return smem + kQBytes + kOBytes + block % Cfg::kStages * Cfg::TileK::kBytes;
  }
  __device__ uint32_t v_in_buffer(uint32_t block) const {
    return smem + kValues + block % Cfg::kStages * Cfg::TileV::kBytes;
  }
  __device__ uint32_t v_buffer(uint32_t block) const {
    if constexpr (!Cfg::kIsFp8) return v_in_buffer(block);
    return smem + kValues + kVBytes + block % Cfg::kStages * Cfg::TileVt::kBytes;
  }

  // Of the 64 rows of a consumer: log-sum-exps, and what normalises O.
  __device__ uint32_t lse_buffer(int consumer) const { return smem + kLses + consumer * 512; }
  __device__ uint32_t factor_buffer(int consumer) const { return lse_buffer(consumer) + 256; }

  __device__ QRing q(int consumer) const { return {smem + kBarriers + consumer * QRing::kBytes}; }
  __device__ ORing o(int consumer) const {
    return {q(kConsumers).barriers + consumer * ORing::kBytes};
  }
  __device__ KRing k() const { return {o(kConsumers).barriers}; }
  __device__ KRing v() const { return {k().barriers + KRing::kBytes}; }
  __device__ TileRing tiles() const { return {v().barriers + KRing::kBytes}; }
  __device__ TileRing begun() const { return {tiles().barriers + TileRing::kBytes}; }
  __device__ KRing v_in() const {
    if constexpr (!Cfg::kIsFp8) return v();
    return {begun().barriers + TileRing::kBytes};
  }
  __device__ AnyTile& tile(uint32_t i) const {
    unsigned char* records = storage + kBarriers + kTileRecords;
    return *reinterpret_cast<AnyTile*>(records + i % kTiles * kRecordBytes);
  }
  __device__ TileRing next() const { return {smem + kBarriers + kNextTiles}; }
  __device__ uint32_t next_tile(uint32_t i) const {
    return next().barriers + TileRing::kBytes + i % kTiles * 4;
  }
  // CTAs that load K and V together, and which of them this is.
  __device__ int ctas() const { return Cfg::kMayPair ? ptx::cluster_size() : 1; }
  __device__ int rank() const { return Cfg::kMayPair ? ptx::cluster_rank() : 0; }

  // Of the tile.
  __device__ Descale& descale(uint32_t i) const {
    static_assert(Cfg::kIsFp8, "16-bit elements are taken as they are");
    return reinterpret_cast<Descale*>(storage + kBarriers + kDescales)[i % kTiles];
  }

  // By all threads.
  __device__ void init() const {
    if (threadIdx.x == 0) {
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        q(consumer).init(1, 4);  // its warps
        o(consumer).init(128, 1);
      }
      k().init(1, ctas() * kConsumers);
      v().init(Cfg::kIsFp8 ? kTransposers : 1, ctas() * kConsumers);
      if constexpr (Cfg::kMayPair) next().init(1, 1);
      if constexpr (Cfg::kIsFp8) v_in().init(1, kTransposers);
      tiles().init(1, kConsumers + 1 + Cfg::kIsFp8 * kTransposers);
      begun().init(1, 1);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if constexpr (Cfg::kMayPair) meet();
  }

  // By all threads of a warp, and of those of the pair that have not ended.
  __device__ void meet() const {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
};

}  // namespace flash::sm90
