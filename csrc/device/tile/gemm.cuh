// Products of warp tiles with mma.m16n8k16: fragments, and how they come from shared memory.
//
// Of an m16n8 accumulator, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next:
// c[0], c[1] of the first row, c[2], c[3] of the second. Two neighbouring accumulators, packed to 16
// bits, are just the A operand of a k16 step: that is how P feeds P V without leaving registers.
#pragma once

#include "ptx/math.cuh"
#include "tile/smem_tile.cuh"

namespace flash::tile {

// kM x 16 rows by kN x 8 columns of accumulators.
template <int kM, int kN>
struct Accumulators {
  float c[kM][kN][4];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
      }
    }
  }

  // All entries of a row become one value.
  __device__ void fill_rows(const float (&x)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = x[m][i / 2];
      }
    }
  }
};

// The A operand (16 x 16) at row `row`, columns 16 `k16` of a tile stored by rows.
template <class Tile>
__device__ inline void load_a(uint32_t (&a)[4], uint32_t smem, int row, int k16, int lane) {
  ptx::ldmatrix_x4(a, smem + Tile::offset(row + lane % 16, 2 * k16 + lane / 16));
}

// Two B operands (16 x 8 each) whose columns are rows [row, row + 16) of a tile: b[0], b[1] of the
// first eight, b[2], b[3] of the second. So S = Q K^T reads K.
template <class Tile>
__device__ inline void load_b_rows(uint32_t (&b)[4], uint32_t smem, int row, int k16, int lane) {
  const int r = row + lane % 8 + lane / 16 * 8;
  ptx::ldmatrix_x4(b, smem + Tile::offset(r, 2 * k16 + lane / 8 % 2));
}

// Two B operands whose columns are columns [16 `n16`, + 16) of a tile and whose k runs over its rows
// [row, row + 16). So O = P V reads V.
template <class Tile>
__device__ inline void load_b_cols(uint32_t (&b)[4], uint32_t smem, int row, int n16, int lane) {
  ptx::ldmatrix_x4_trans(b, smem + Tile::offset(row + lane % 16, 2 * n16 + lane / 16));
}

// acc += A B^T: A rows [row, + 16 kM) of tile TileA, B all rows of tile TileB.
template <class T, class TileA, class TileB, int kM, int kN>
__device__ inline void multiply_abt(Accumulators<kM, kN>& acc, uint32_t a_smem, uint32_t b_smem,
                                    int row, int lane) {
  static_assert(TileA::kCols == TileB::kCols && TileB::kRows == kN * 8, "shapes must agree");
#pragma unroll
  for (int k = 0; k < TileA::kCols / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a<TileA>(a[m], a_smem, row + 16 * m, k, lane);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_b_rows<TileB>(b, b_smem, 8 * n, k, lane);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(acc.c[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc.c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += P B: P as packed A operands of kK steps of 16, B all columns of tile TileB.
template <class T, class TileB, int kM, int kN, int kK>
__device__ inline void multiply_pb(Accumulators<kM, kN>& acc, const uint32_t (&p)[kM][kK][4],
                                   uint32_t b_smem, int lane) {
  static_assert(TileB::kCols == kN * 8 && TileB::kRows == kK * 16, "shapes must agree");
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_b_cols<TileB>(b, b_smem, 16 * k, n / 2, lane);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(acc.c[m][n], p[m][k], b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc.c[m][n + 1], p[m][k], b[2], b[3]);
      }
    }
  }
}

// Accumulators as packed A operands: columns [16 k, + 16) become step k.
template <class T, int kM, int kN>
__device__ inline void pack_a(uint32_t (&p)[kM][kN / 2][4], const Accumulators<kM, kN>& acc) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) {
      const float(&left)[4] = acc.c[m][2 * k];
      const float(&right)[4] = acc.c[m][2 * k + 1];
      p[m][k][0] = ptx::pack<T>(left[0], left[1]);
      p[m][k][1] = ptx::pack<T>(left[2], left[3]);
      p[m][k][2] = ptx::pack<T>(right[0], right[1]);
      p[m][k][3] = ptx::pack<T>(right[2], right[3]);
    }
  }
}

}  // namespace flash::tile
