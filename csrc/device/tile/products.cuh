// Products of parts of shared-memory tiles: every warp computes a rectangle of the result.
//
// Named by how the operands lie: A or B is a tile by rows, "t" its transpose. ldmatrix transposes
// on the way, so no tile is ever stored twice.
#pragma once

#include "tile/gemm.cuh"

namespace flash::tile {

// A fragment's place in a tile, from a lane's place in the fragment at (0, 0): `row` is a multiple
// of 8 and `chunk` has no bit in common with the chunk that `lane_address` was made with, so the
// swizzle is one XOR. Both are constants where loops are unrolled: all fragments share a few
// registers.
template <class Tile>
__device__ inline uint32_t walk(uint32_t lane_address, int row, int chunk) {
  return (lane_address ^ (chunk % Tile::kPanelChunks << 4)) +
         chunk / Tile::kPanelChunks * Tile::kPanelBytes + row * Tile::kPanel * 2;
}

// B operands whose columns are columns [col, + 8 kN) of a tile and whose k runs over its rows.
template <class Tile, int kN>
struct ColumnsOfB {
  // Whether the columns fill panels or share one, so that walk() can take them.
  static constexpr bool kWalks = kN * 8 % Tile::kPanel == 0 || Tile::kPanel % (kN * 8) == 0;
  uint32_t smem;
  int row, chunk;

  __device__ ColumnsOfB(uint32_t smem, int col, int lane)
      : smem(smem), row(lane % 16), chunk(col / kChunk + lane / 16) {
    if (kWalks) this->smem += Tile::offset(row, chunk);
  }

  // Columns [8 n, + 16), rows [16 k, + 16).
  __device__ void load(uint32_t (&b)[4], int k, int n) const {
    if (kWalks) {
      ptx::ldmatrix_x4_trans(b, walk<Tile>(smem, 16 * k, n));
    } else {
      ptx::ldmatrix_x4_trans(b, smem + Tile::offset(row + 16 * k, chunk + n));
    }
  }
};

// acc += A B^T: A rows [row, + 16 kM), B rows [col, + 8 kN).
template <class T, class TileA, class TileB, int kM, int kN>
__device__ inline void multiply_abt(Accumulators<kM, kN>& acc, uint32_t a_smem, uint32_t b_smem,
                                    int row, int col, int lane) {
  static_assert(TileA::kCols == TileB::kCols, "shapes must agree");
  const uint32_t a_lane = a_smem + TileA::offset(row + lane % 16, lane / 16);
  const uint32_t b_lane = b_smem + TileB::offset(col + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < TileA::kCols / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(a[m], walk<TileA>(a_lane, 16 * m, 2 * k));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, walk<TileB>(b_lane, 8 * n, 2 * k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(acc.c[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc.c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += A B: A rows [row, + 16 kM), B columns [col, + 8 kN).
template <class T, class TileA, class TileB, int kM, int kN>
__device__ inline void multiply_ab(Accumulators<kM, kN>& acc, uint32_t a_smem, uint32_t b_smem,
                                   int row, int col, int lane) {
  static_assert(TileA::kCols == TileB::kRows, "shapes must agree");
  const uint32_t a_lane = a_smem + TileA::offset(row + lane % 16, lane / 16);
  const ColumnsOfB<TileB, kN> columns(b_smem, col, lane);
#pragma unroll
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(a[m], walk<TileA>(a_lane, 16 * m, 2 * k));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      columns.load(b, k, n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(acc.c[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc.c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += A^T B: A columns [row, + 16 kM), B columns [col, + 8 kN).
template <class T, class TileA, class TileB, int kM, int kN>
__device__ inline void multiply_atb(Accumulators<kM, kN>& acc, uint32_t a_smem, uint32_t b_smem,
                                    int row, int col, int lane) {
  static_assert(TileA::kRows == TileB::kRows, "shapes must agree");
  static_assert((kM & (kM - 1)) == 0, "walk() takes columns of A by an XOR");
  const uint32_t a_lane =
      a_smem + TileA::offset(lane % 8 + lane / 16 * 8, row / kChunk + lane / 8 % 2);
  const ColumnsOfB<TileB, kN> columns(b_smem, col, lane);
#pragma unroll
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4_trans(a[m], walk<TileA>(a_lane, 16 * k, 2 * m));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      columns.load(b, k, n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(acc.c[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc.c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace flash::tile
