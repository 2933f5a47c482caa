// Tiles of 16-bit elements in shared memory, swizzled so that ldmatrix and 16-byte stores meet no
// bank conflict.
//
// A tile of kRows x kCols is cut into panels of 64 columns (32 where 64 does not divide kCols). In a
// panel a row is 128 (64) bytes, and its 16-byte chunks are permuted by an XOR with the row:
//
//   64 columns:  chunk' = chunk ^ (row % 8)          8 rows x 16 B hit 8 different chunks
//   32 columns:  chunk' = chunk ^ (row / 2 % 4)      two rows share 128 B, so every other row turns
#pragma once

#include "ptx/memory.cuh"

namespace flash::tile {

constexpr int kChunk = 8;  // elements in 16 bytes

template <int kRows_, int kCols_>
struct SmemTile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPanel = kCols % 64 == 0 ? 64 : 32;
  static constexpr int kPanelChunks = kPanel / kChunk;
  static constexpr int kPanelBytes = kRows * kPanel * 2;
  static constexpr int kBytes = kRows * kCols * 2;
  static_assert(kCols % kPanel == 0, "a tile is cut into whole panels");

  // Byte offset of a 16-byte chunk.
  __device__ static uint32_t offset(int row, int chunk) {
    const int turn = kPanel == 64 ? row & 7 : (row >> 1) & 3;
    const int panel = chunk / kPanelChunks;
    return panel * kPanelBytes + row * (kPanel * 2) + (((chunk % kPanelChunks) ^ turn) << 4);
  }
};

// Copies rows [0, kRows) of global memory into a tile, asynchronously. Row r comes from
// `source(r)`, a pointer to its first element; rows from `num_rows` on and columns from `num_cols`
// on (a multiple of 8) become zeros.
template <class Tile, int kThreads, class Source>
__device__ inline void load_async(uint32_t smem, const Source& source, int num_rows, int num_cols,
                                  int thread) {
  constexpr int kRowsPerPass = kThreads / Tile::kPanelChunks;
  static_assert(kRowsPerPass % 8 == 0, "the swizzle must be the same in every pass");
  static_assert(Tile::kRows % kRowsPerPass == 0, "a tile takes whole passes");
  const int row0 = thread / Tile::kPanelChunks;
  const int col0 = thread % Tile::kPanelChunks * kChunk;
  const uint32_t to = smem + Tile::offset(row0, col0 / kChunk);
#pragma unroll
  for (int pass = 0; pass < Tile::kRows / kRowsPerPass; ++pass) {
    const int row = row0 + pass * kRowsPerPass;
    const uint16_t* from = source(row) + col0;
#pragma unroll
    for (int panel = 0; panel < Tile::kCols / Tile::kPanel; ++panel) {
      const bool valid = row < num_rows && panel * Tile::kPanel + col0 < num_cols;
      ptx::cp_async_16(to + panel * Tile::kPanelBytes + pass * kRowsPerPass * Tile::kPanel * 2,
                       from + panel * Tile::kPanel, valid);
    }
  }
}

}  // namespace flash::tile
