// How rows come in: strided rows of global memory to a shared-memory tile, asynchronously.
#pragma once

#include "tile/smem_tile.cuh"

namespace flash::tile {

// Copies rows of global memory into a tile, asynchronously, as load_async() does, where rows are a
// stride apart: a pointer walks.
template <class Tile, int kThreads>
__device__ inline void load_rows(uint32_t smem, const uint16_t* from, int64_t row_stride,
                                 int num_rows, int num_cols, int thread) {
  constexpr int kRowsPerPass = kThreads / Tile::kPanelChunks;
  static_assert(kRowsPerPass % 8 == 0, "the swizzle must be the same in every pass");
  static_assert(Tile::kRows % kRowsPerPass == 0, "a tile takes whole passes");
  const int row = thread / Tile::kPanelChunks;
  const int col = thread % Tile::kPanelChunks * kChunk;
  const uint32_t to = smem + Tile::offset(row, thread % Tile::kPanelChunks);
  from += row * row_stride + col;
#pragma unroll
  for (int pass = 0; pass < Tile::kRows / kRowsPerPass; ++pass) {
#pragma unroll
    for (int panel = 0; panel < Tile::kCols / Tile::kPanel; ++panel) {
      const bool valid =
          row + pass * kRowsPerPass < num_rows && col + panel * Tile::kPanel < num_cols;
      ptx::cp_async_16(to + panel * Tile::kPanelBytes + pass * kRowsPerPass * Tile::kPanel * 2,
                       from + panel * Tile::kPanel, valid);
    }
    from += kRowsPerPass * row_stride;
  }
}

}  // namespace flash::tile
