// Tiles of 16-bit elements in shared memory, swizzled so that ldmatrix and 16-byte stores meet no
// bank conflict.
//
// A tile of kRows x kCols is cut into panels of 64 columns (32 where 64 does not divide kCols). In
// a panel a row is 128 (64) bytes, and its 16-byte chunks are permuted by an XOR with the row:
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

}  // namespace flash::tile
