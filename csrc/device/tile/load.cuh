// How rows come in: rows of global memory to a shared-memory tile, asynchronously.
#pragma once

#include "tile/smem_tile.cuh"

namespace flash::tile {

// One thread's share in loading tiles whose rows are a stride apart. kThreads threads take a pass
// of kRowsPerPass rows, one chunk of every panel each; then a pointer walks to the next pass.
template <class Tile, int kThreads>
struct RowLoader {
  static constexpr int kRowsPerPass = kThreads / Tile::kPanelChunks;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static constexpr int kPanels = Tile::kCols / Tile::kPanel;
  static_assert(kRowsPerPass % 8 == 0, "the swizzle must be the same in every pass");
  static_assert(Tile::kRows % kRowsPerPass == 0, "a tile takes whole passes");

  __device__ static int row(int thread) { return thread / Tile::kPanelChunks; }
  __device__ static int col(int thread) { return thread % Tile::kPanelChunks * kChunk; }

  // Where the share begins in global memory, from the first element of row 0.
  __device__ static int64_t begin(int64_t row_stride, int thread) {
    return row(thread) * row_stride + col(thread);
  }

  // And in shared memory: chunk `panel` of pass `pass`.
  __device__ static uint32_t chunk(uint32_t smem, int pass, int panel, int thread) {
    return smem + Tile::offset(row(thread), thread % Tile::kPanelChunks) +
           panel * Tile::kPanelBytes + pass * kRowsPerPass * Tile::kPanel * 2;
  }

  // Loads a tile from the last pass to the first. `from`, this thread's share of the pass behind,
  // walks along, so that the tile in front can come next. Rows from `num_rows` on and columns from
  // `num_cols` on (a multiple of 8) become zeros.
  __device__ static void load_back(uint32_t smem, const uint16_t*& from, int64_t row_stride,
                                   int num_rows, int num_cols, int thread) {
#pragma unroll
    for (int pass = kPasses - 1; pass >= 0; --pass) {
      from = ptx::opaque(from - kRowsPerPass * row_stride);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const bool valid = row(thread) + pass * kRowsPerPass < num_rows &&
                           col(thread) + panel * Tile::kPanel < num_cols;
        ptx::cp_async_16(chunk(smem, pass, panel, thread), from + panel * Tile::kPanel, valid);
      }
    }
  }

  // The same for all rows of a tile that was loaded before: columns from `num_cols` on stay.
  __device__ static void reload_back(uint32_t smem, const uint16_t*& from, int64_t row_stride,
                                     int num_cols, int thread) {
#pragma unroll
    for (int pass = kPasses - 1; pass >= 0; --pass) {
      from = ptx::opaque(from - kRowsPerPass * row_stride);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        ptx::cp_async_16_if(col(thread) + panel * Tile::kPanel < num_cols,
                            chunk(smem, pass, panel, thread), from + panel * Tile::kPanel);
      }
    }
  }

  // Of rows that each stand on their own, row r at source(r).
  template <class Source>
  __device__ static void gather(uint32_t smem, const Source& source, int num_rows, int num_cols,
                                int thread) {
    const uint16_t* from[kPasses];  // all look-ups are under way at once
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      from[pass] = source(row(thread) + pass * kRowsPerPass) + col(thread);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const bool valid = row(thread) + pass * kRowsPerPass < num_rows &&
                           col(thread) + panel * Tile::kPanel < num_cols;
        ptx::cp_async_16(chunk(smem, pass, panel, thread), from[pass] + panel * Tile::kPanel,
                         valid);
      }
    }
  }
};

// Copies rows of global memory into a tile: row r is at `from` + r * row_stride. Rows from
// `num_rows` on and columns from `num_cols` on become zeros.
template <class Tile, int kThreads>
__device__ inline void load_rows(uint32_t smem, const uint16_t* from, int64_t row_stride,
                                 int num_rows, int num_cols, int thread) {
  using Loader = RowLoader<Tile, kThreads>;
  from += Loader::begin(row_stride, thread);
#pragma unroll
  for (int pass = 0; pass < Loader::kPasses; ++pass) {
#pragma unroll
    for (int panel = 0; panel < Loader::kPanels; ++panel) {
      const bool valid = Loader::row(thread) + pass * Loader::kRowsPerPass < num_rows &&
                         Loader::col(thread) + panel * Tile::kPanel < num_cols;
      ptx::cp_async_16(Loader::chunk(smem, pass, panel, thread), from + panel * Tile::kPanel,
                       valid);
    }
    from += Loader::kRowsPerPass * row_stride;
  }
}

// Fills a tile with zeros.
template <class Tile, int kThreads>
__device__ inline void clear(uint32_t smem, int thread) {
  for (int at = 16 * thread; at < Tile::kBytes; at += 16 * kThreads) {
    ptx::st_shared_128(smem + at, make_uint4(0, 0, 0, 0));
  }
}

}  // namespace flash::tile
