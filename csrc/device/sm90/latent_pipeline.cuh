// Shared memory of a CTA that attends over a latent (latent.cuh), and the barriers that guard it.
#pragma once

#include "sm90/parts.cuh"
#include "sm90/pipeline.cuh"

namespace flash::sm90 {

template <class T_, int kValueDim_>
struct LatentConfig {
  using T = T_;
  static constexpr LatentTile kTile = latent_tile(kValueDim_);
  static constexpr int kThreads = kTile.threads();
  static constexpr int kBlockM = kTile.block_m();
  static constexpr int kBlockN = kTile.block_n();
  static constexpr int kStages = kTile.stages;
  static constexpr int kHeadDim = LatentTile::kHeadDim;
  static constexpr int kValueDim = kValueDim_;
  // As tiles are planned (producer.cuh): all rows are those of one consumer, whoever computes them.
  static constexpr bool kServesAll = true;
  // Two CTAs with other heads of the same queries load keys together.
  static constexpr bool kMayPair = true;
  static constexpr bool kPairsHeads = true;
  static constexpr int kConsumers = 1;
  // Of Q and of the second query, and of K and V: one beside the other.
  using TileQ = tile::SmemTile<kBlockM, kTile.columns()>;
  using TileKV = tile::SmemTile<kBlockN, kTile.columns()>;
  using TileP = tile::SmemTile<kBlockM, kBlockN>;
  static constexpr int kPanels = kTile.columns() / 64;  // the first is K's
  static constexpr int kHeldPanels = 2;                 // of Q, for which registers are left
  using AccS = tile::Accumulators<1, kBlockN / 8>;
  using AccO = tile::Accumulators<1, kValueDim / 2 / 8>;  // of half the columns
};

// Where the consumers meet.
enum LatentBarrier {
  kOwn = 1,       // of one consumer; the other's is the next
  kFromEven = 3,  // P of a block in an even place is there, from the first consumer
  kFromOdd = 4,   // P of the one behind it, from the second
  kEnd = 5,       // sums of a tile are there
  kTurn = 6,      // the first consumer's scores are there, the second's products may begin
};

//   q:      full: TMA has brought the queries   empty: both consumers have multiplied them last
//   panels: full: this panel of a block of K    empty: of the first one: both are done with the
//           and V is there                             block
//   tiles:  full: the planner has written       empty: all has left, and it has been loaded
//   ended:  full: all its loads have begun      (nobody waits until it is empty)
//   next:   as in pipeline.cuh
//
// Of a pair, blocks are the same in both CTAs. Each copies half of the panels, to both.
template <class Cfg>
struct LatentPipeline {
  static constexpr int kTiles = 2;
  static constexpr int kWarps = 8;    // that compute
  static constexpr int kLoaders = 2;  // warps that load blocks
  static constexpr int kBlocks = Cfg::TileQ::kBytes;
  static constexpr int kP = kBlocks + Cfg::kStages * Cfg::TileKV::kBytes;
  static constexpr int kShifts = kP + Cfg::TileP::kBytes;
  static constexpr int kSums = kShifts + Cfg::kBlockM * 4;
  static constexpr int kBarriers = kSums + 2 * 2 * Cfg::kBlockM * 4;
  using QRing = Ring<1>;
  using PanelRing = Ring<Cfg::kStages>;
  using TileRing = Ring<kTiles>;
  static constexpr int kRecords =
      kBarriers + QRing::kBytes + Cfg::kPanels * PanelRing::kBytes + 2 * TileRing::kBytes;
  static constexpr int kRecordBytes = 128;
  static_assert(sizeof(TileOf<true>) <= kRecordBytes, "a record has room");
  static constexpr int kNextTiles = kRecords + kTiles * kRecordBytes;
  static_assert(kNextTiles + TileRing::kBytes + kTiles * 4 <= Cfg::kTile.smem_bytes(),
                "room at the end");

  unsigned char* storage;
  uint32_t smem;

  __device__ explicit LatentPipeline(unsigned char* storage)
      : storage(storage), smem(ptx::smem_address(storage)) {}

  __device__ uint32_t q_buffer() const { return smem; }
  // K, and behind its panel V.
  __device__ uint32_t k_buffer(uint32_t block) const {
    return smem + kBlocks + block % Cfg::kStages * Cfg::TileKV::kBytes;
  }
  __device__ uint32_t v_buffer(uint32_t block) const {
    return k_buffer(block) + Cfg::TileKV::kPanelBytes;
  }
  __device__ uint32_t p_buffer() const { return smem + kP; }
  // Of a row: the shift of its P in there, and a consumer's sum of a tile.
  __device__ uint32_t shift_of(int row) const { return smem + kShifts + row * 4; }
  __device__ uint32_t sum_of(uint32_t tile, int consumer, int row) const {
    return smem + kSums + (tile % 2 * 2 + consumer) * Cfg::kBlockM * 4 + row * 4;
  }

  __device__ QRing q() const { return {smem + kBarriers}; }
  __device__ PanelRing panel(int i) const {
    return {q().barriers + QRing::kBytes + i * PanelRing::kBytes};
  }
  __device__ TileRing tiles() const { return {panel(Cfg::kPanels).barriers}; }
  __device__ TileRing ended() const { return {tiles().barriers + TileRing::kBytes}; }
  __device__ TileOf<true>& tile(uint32_t i) const {
    return *reinterpret_cast<TileOf<true>*>(storage + kRecords + i % kTiles * kRecordBytes);
  }
  __device__ TileRing next() const { return {smem + kNextTiles}; }
  __device__ uint32_t next_tile(uint32_t i) const {
    return next().barriers + TileRing::kBytes + i % kTiles * 4;
  }
  // CTAs that load keys together, and which of them this is.
  __device__ int ctas() const { return ptx::cluster_size(); }
  __device__ int rank() const { return ptx::cluster_rank(); }

  // By all threads. `loaders`: threads that say that a panel is there.
  __device__ void init(int loaders) const {
    if (threadIdx.x == 0) {
      q().init(1, 2);
      for (int i = 0; i < Cfg::kPanels; ++i) panel(i).init(loaders, 2 * ctas());
      tiles().init(1, kWarps + kLoaders);
      ended().init(1, 1);
      next().init(1, 1);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    meet();
  }

  // By all threads of a warp, and of those of the pair that have not ended.
  __device__ void meet() const {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
};

}  // namespace flash::sm90
