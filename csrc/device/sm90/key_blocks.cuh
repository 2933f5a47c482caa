// Blocks of K and V in memory, and how they come to shared memory.
#pragma once

#include "ptx/tma.cuh"
#include "sm90/pipeline.cuh"

namespace flash::sm90 {

// Copies the first `num_panels` panels of a tile; their bytes count at `full`. `keep`: what L2 does
// with them, if anything is said.
template <class SmemTile, class... Keep>
__device__ inline void copy_tile(uint32_t smem, const TensorMap& map, uint32_t full, int num_panels,
                                 int row, int head, int batch, Keep... keep) {
#pragma unroll
  for (int panel = 0; panel < SmemTile::kCols / 64; ++panel) {
    if (panel < num_panels) {
      ptx::tma_load(smem + panel * SmemTile::kPanelBytes, map, full, panel * 64, row, head, batch,
                    keep...);
    }
  }
}

// The same, announced; `more_bytes` will come by another copy.
template <class SmemTile, class... Keep>
__device__ inline void load_tile(uint32_t smem, const TensorMap& map, uint32_t full, int num_panels,
                                 int row, int head, int batch, int more_bytes = 0, Keep... keep) {
  ptx::mbarrier_arrive_expect(full, num_panels * SmemTile::kPanelBytes + more_bytes);
  copy_tile<SmemTile>(smem, map, full, num_panels, row, head, batch, keep...);
}

// Keys are read again for other rows, Q is not.
constexpr ptx::Keep kKeepKeys = ptx::Keep::kLong;

// A block whose rows stand one behind the other. One lane copies it.
template <class TileK>
class BlockOfRows {
 protected:
  int row_, head_, batch_;

 public:
  __device__ BlockOfRows() {}
  __device__ BlockOfRows(const Sequences&, const Tile& tile, int j, int)
      : row_(tile.first_k + j * TileK::kRows), head_(tile.head_k), batch_(tile.batch_k) {}

  __device__ void load(uint32_t smem, const TensorMap& map, uint32_t full, int num_panels) const {
    load_tile<TileK>(smem, map, full, num_panels, row_, head_, batch_, 0, kKeepKeys);
  }
  __device__ static int begin(const Tile& tile) { return tile.begin; }
  __device__ static int end(const Tile& tile) { return tile.end; }
  __device__ static bool is_leader(int) { return true; }
  __device__ static void join() {}
};

// The same by two CTAs: what both need, each copies half of to both. What this one has no use for
// is no copy.
template <class TileK>
class BlockOfPair : public BlockOfRows<TileK> {
  using Base = BlockOfRows<TileK>;
  using Base::batch_;
  using Base::head_;
  using Base::row_;
  static constexpr int kHalf = TileK::kRows / 2;  // rows of a copy
  bool is_own_, is_shared_;

 public:
  __device__ BlockOfPair() {}
  __device__ BlockOfPair(const Sequences& seqs, const Tile& tile, int j, int lane)
      : Base(seqs, tile, j, lane),
        is_own_(tile.begin <= j && j < tile.end),
        is_shared_(tile.shared.begin <= j && j < tile.shared.end) {}

  __device__ void load(uint32_t smem, const TensorMap& map, uint32_t full, int num_panels) const {
    if (!is_own_) {
      ptx::mbarrier_arrive(full);
      return;
    }
    ptx::mbarrier_arrive_expect(full, num_panels * TileK::kPanelBytes);
    const int first = is_shared_ ? ptx::cluster_rank() : 0;
#pragma unroll 1
    for (int panel = 0; panel < num_panels; ++panel) {
      const uint32_t to = smem + panel * TileK::kPanelBytes + first * kHalf * 128;
      const int row = row_ + first * kHalf;
      if (is_shared_) {
        ptx::tma_load_to_both(to, map, full, panel * 64, row, head_, batch_, kKeepKeys);
      } else {
        ptx::tma_load(to, map, full, panel * 64, row, head_, batch_, kKeepKeys);
        ptx::tma_load(to + kHalf * 128, map, full, panel * 64, row + kHalf, head_, batch_,
                      kKeepKeys);
      }
    }
  }
  __device__ static int begin(const Tile& tile) { return tile.of_pair.begin; }
  __device__ static int end(const Tile& tile) { return tile.of_pair.end; }
};

// The page of a key of a tile's sequence: one of the cache, whatever the table holds.
__device__ inline int page_of(const Sequences& seqs, const Tile& tile, int key) {
  const int32_t* pages = seqs.block_table + tile.batch_k * seqs.block_table_stride;
  return min(max(pages[key / seqs.page_size], 0), seqs.num_pages - 1);
}

// Rows of a page that are one copy: those from `key` on.
struct PieceOfPage {
  int row, page;

  __device__ PieceOfPage() {}
  __device__ PieceOfPage(const Sequences& seqs, const Tile& tile, int key, int rows) {
    // Pieces behind the last key are any; the table is not read where there is no key.
    const int last = max(tile.sk - 1, 0) / rows * rows;
    key = min(key, last);
    page = tile.sk > 0 ? page_of(seqs, tile, key) : 0;
    row = key % seqs.page_size;
  }
};

// A block in pages. It comes in pieces, each as many rows as divide both page and block, and of one
// panel; a warp copies it, each lane a piece, whose page it looks up.
template <class TileK>
class BlockOfPages {
  static constexpr int kPanels = TileK::kCols / 64;
  static_assert(TileK::kRows / kLeastPageRows * kPanels <= 32, "a piece for each lane");
  int panel_, first_;  // of the piece: where it stands in the block
  PieceOfPage piece_;
  int head_;

 public:
  __device__ BlockOfPages() {}
  __device__ BlockOfPages(const Sequences& seqs, const Tile& tile, int j, int lane) {
    const int rows = rows_of_piece(seqs.page_size, TileK::kRows);
    const int pieces = TileK::kRows / rows;
    panel_ = lane / pieces;
    first_ = lane % pieces * rows;
    piece_ = PieceOfPage(seqs, tile, j * TileK::kRows + first_, rows);
    head_ = tile.head_k;
  }

  __device__ void load(uint32_t smem, const TensorMap& map, uint32_t full, int num_panels) const {
    if (panel_ == 0 && first_ == 0) {
      ptx::mbarrier_arrive_expect(full, num_panels * TileK::kPanelBytes);
    }
    join();
    if (panel_ < num_panels) {
      ptx::tma_load(smem + panel_ * TileK::kPanelBytes + first_ * 128, map, full, panel_ * 64,
                    piece_.row, head_, piece_.page, kKeepKeys);
    }
  }
  __device__ static int begin(const Tile& tile) { return tile.begin; }
  __device__ static int end(const Tile& tile) { return tile.end; }
  __device__ static bool is_leader(int lane) { return lane == 0; }
  __device__ static void join() { __syncwarp(); }
};

}  // namespace flash::sm90
