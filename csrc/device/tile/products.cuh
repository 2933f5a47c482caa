// Products of parts of shared-memory tiles: every warp computes a rectangle of the result.
//
// Named by how the operands lie: A or B is a tile by rows, "t" its transpose. ldmatrix transposes
// on the way, so no tile is ever stored twice.
#pragma once

#include "tile/accumulators.cuh"

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

// A operands of the first kHeld steps of k, which stay in registers from product to product.
template <int kM, int kHeld>
struct HeldA {
  uint32_t a[kHeld][kM][4];

  template <class Tile>
  __device__ void load(uint32_t smem, int row, int lane) {
    const uint32_t at = smem + Tile::offset(row + lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
#pragma unroll
      for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(a[k][m], walk<Tile>(at, 16 * m, 2 * k));
    }
  }

  __device__ void get(uint32_t (&to)[4], int k, int m) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = a[k][m][i];
  }
};

template <int kM>
struct HeldA<kM, 0> {
  template <class Tile>
  __device__ void load(uint32_t, int, int) {}
  __device__ void get(uint32_t (&)[4], int, int) const {}
};

struct DoNothing {
  __device__ void operator()() const {}
};

// acc += the products of step k, of operands of A with those of B.
template <class T, int kM, int kN, class OperandsOfB>
__device__ inline void multiply_step(Accumulators<kM, kN>& acc, const uint32_t (&a)[kM][4],
                                     const OperandsOfB& operands, int k) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t b[4];
    operands.load(b, k, n);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ptx::mma_m16n8k16<T>(acc.c[m][n], a[m], b[0], b[1]);
      ptx::mma_m16n8k16<T>(acc.c[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

// acc += A B^T: A rows [row, + 16 kM), B rows [col, + 8 kN). `behind_first` is called behind the
// first step of k: loads that start there do not keep the first fragments waiting.
template <class T, class TileA, class TileB, int kM, int kN, int kHeld = 0,
          class Action = DoNothing>
__device__ inline void multiply_abt(Accumulators<kM, kN>& acc, uint32_t a_smem, uint32_t b_smem,
                                    int row, int col, int lane, const HeldA<kM, kHeld>& held = {},
                                    const Action& behind_first = {}) {
  static_assert(TileA::kCols == TileB::kCols, "shapes must agree");
  const uint32_t a_lane = a_smem + TileA::offset(row + lane % 16, lane / 16);
  const uint32_t b_lane = b_smem + TileB::offset(col + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < TileA::kCols / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (k < kHeld) {
        held.get(a[m], k, m);
      } else {
        ptx::ldmatrix_x4(a[m], walk<TileA>(a_lane, 16 * m, 2 * k));
      }
    }
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
    if (k == 0) behind_first();
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
    multiply_step<T>(acc, a, columns, k);
  }
}

// acc += P B: P, accumulators rounded, are the A operands; B has kN x 8 columns.
template <class T, class TileB, int kM, int kP, int kN>
__device__ inline void multiply_pb(Accumulators<kM, kN>& acc, const Accumulators<kM, kP>& p,
                                   uint32_t b_smem, int lane) {
  static_assert(TileB::kCols == kN * 8 && TileB::kRows == kP * 8, "shapes must agree");
  const ColumnsOfB<TileB, kN> columns(b_smem, 0, lane);
#pragma unroll
  for (int k = 0; k < kP / 2; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = p.c[m][2 * k + i / 2];
        a[m][i] = ptx::pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
    multiply_step<T>(acc, a, columns, k);
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
    multiply_step<T>(acc, a, columns, k);
  }
}

}  // namespace flash::tile
