// How accumulators leave: rounded into a shared-memory tile, from there to global memory; or added
// to floats in global memory, in an order of our own.
#pragma once

#include "tile/accumulators.cuh"

namespace flash::tile {

// Rounds accumulators times `factor` into rows [row, ...), columns [col, ...) of a tile.
template <class T, class Tile, int kM, int kN>
__device__ inline void store_rounded(uint32_t smem, const Accumulators<kM, kN>& acc, float factor,
                                     int row, int col, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * m + 8 * h + lane / 4;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        ptx::st_shared_32(
            smem + Tile::offset(r, col / kChunk + n) + lane % 4 * 4,
            ptx::pack<T>(acc.c[m][n][2 * h] * factor, acc.c[m][n][2 * h + 1] * factor));
      }
    }
  }
}

// Stores one of the two rows that a lane has of 16, the upper one or that 8 below, from registers:
// unrounded, and rounded.
template <int kN>
__device__ inline void store_row(float* to, const float (&acc)[kN][4], int is_lower, float factor,
                                 int num_cols, int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    if (8 * n < num_cols) {
      *reinterpret_cast<float2*>(to + 8 * n + lane % 4 * 2) =
          make_float2(acc[n][2 * is_lower] * factor, acc[n][2 * is_lower + 1] * factor);
    }
  }
}
template <class T, int kN>
__device__ inline void store_row(uint16_t* to, const float (&acc)[kN][4], int is_lower,
                                 float factor, int num_cols, int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    if (8 * n < num_cols) {
      *reinterpret_cast<uint32_t*>(to + 8 * n + lane % 4 * 2) =
          ptx::pack<T>(acc[n][2 * is_lower] * factor, acc[n][2 * is_lower + 1] * factor);
    }
  }
}

// Rows of a tile from `row` on become zeros.
template <class Tile, int kThreads>
__device__ inline void clear_rows(uint32_t smem, int row, int thread) {
  constexpr int kChunks = Tile::kCols / kChunk;
  for (int at = row * kChunks + thread; at < Tile::kRows * kChunks; at += kThreads) {
    ptx::st_shared_128(smem + Tile::offset(at / kChunks, at % kChunks), make_uint4(0, 0, 0, 0));
  }
}

// Copies a tile to global memory, 16 bytes a thread.
template <class Tile, int kThreads>
__device__ inline void copy_out(uint16_t* to, int64_t row_stride, uint32_t smem, int num_rows,
                                int num_cols, int thread) {
  constexpr int kChunks = Tile::kCols / kChunk;
  for (int at = thread; at < Tile::kRows * kChunks; at += kThreads) {
    const int row = at / kChunks;
    const int chunk = at % kChunks;
    if (row < num_rows && chunk * kChunk < num_cols) {
      ptx::st_global_128(to + row * row_stride + chunk * kChunk,
                         ptx::ld_shared_128(smem + Tile::offset(row, chunk)));
    }
  }
}

// The same by one warp alone: rows [row, + kRows) of a tile to `to`, of which `num_rows` are
// wanted.
template <class Tile, int kRows>
__device__ inline void copy_out_rows(uint16_t* to, int64_t row_stride, uint32_t smem, int row,
                                     int num_rows, int num_cols, int lane) {
  constexpr int kRowsPerPass = 32 / Tile::kPanelChunks;
  const int first = lane / Tile::kPanelChunks;
  const int chunk = lane % Tile::kPanelChunks;
  to += first * row_stride + chunk * kChunk;
#pragma unroll
  for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
#pragma unroll
    for (int panel = 0; panel < Tile::kCols / Tile::kPanel; ++panel) {
      if (first + pass * kRowsPerPass < num_rows &&
          chunk * kChunk + panel * Tile::kPanel < num_cols) {
        const uint32_t from = smem + Tile::offset(row + first + pass * kRowsPerPass, chunk);
        ptx::st_global_128(to + panel * Tile::kPanel,
                           ptx::ld_shared_128(from + panel * Tile::kPanelBytes));
      }
    }
    to += kRowsPerPass * row_stride;
  }
}

// Sums of a CTA's accumulators in global memory stand in register order: value i of all threads,
// then value i + 1, so that a warp touches one line at a time. On an H200, red.v4 in place of red
// was 1 % slower at head dim 64.
template <int kThreads>
struct RegisterOrder {
  template <int kM, int kN>
  __device__ static void add(float* to, const Accumulators<kM, kN>& acc, int thread) {
    to += static_cast<uint32_t>(thread);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::red_add_f32(to + ((m * kN + n) * 4 + i) * kThreads, acc.c[m][n][i]);
        }
      }
    }
  }

  // acc += the sums.
  template <int kM, int kN>
  __device__ static void load_add(Accumulators<kM, kN>& acc, const float* from, int thread) {
    from += static_cast<uint32_t>(thread);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc.c[m][n][i] += from[((m * kN + n) * 4 + i) * kThreads];
      }
    }
  }
};

// Sums of tiles of 64 rows in the order in which a warpgroup has them: all threads' four values of
// the first eight columns, then of the next. So are those that are added to them.
struct WarpgroupOrder {
  static constexpr int kEightColumns = 64 * 8;  // floats

  // To shared memory, from where all are added at once.
  template <int kN>
  __device__ static void store(uint32_t to, const Accumulators<1, kN>& acc, int num_columns,
                               int thread) {
    to += 16 * static_cast<uint32_t>(thread);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float (&x)[4] = acc.c[0][n];
      if (8 * n < num_columns) {
        ptx::st_shared_128(to + n * kEightColumns * 4,
                           make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]),
                                      __float_as_uint(x[2]), __float_as_uint(x[3])));
      }
    }
  }

  // acc = the sums.
  template <int kN>
  __device__ static void load(Accumulators<1, kN>& acc, const float* from, int thread) {
    from += 4 * static_cast<uint32_t>(thread);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float4 x = *reinterpret_cast<const float4*>(from + n * kEightColumns);
      acc.c[0][n][0] = x.x;
      acc.c[0][n][1] = x.y;
      acc.c[0][n][2] = x.z;
      acc.c[0][n][3] = x.w;
    }
  }
};

}  // namespace flash::tile
