// Products of a warp with tiles of e4m3, whose elements become f16 on the way from shared memory.
//
// Of their tiles two neighbours are one element of a SmemTile, which ldmatrix moves. Along a row,
// lane l of four then has four columns in a register, where mma wants two and two that stand eight
// further: the columns of A are put in that order beforehand (Fp8Order). Down a column it has two
// columns of two rows, which are two products: one of even columns of B, one of odd.
#pragma once

#include "tile/products.cuh"

namespace flash::tile {

template <class T>
constexpr bool kIsFp8 = false;
template <>
inline constexpr bool kIsFp8<ptx::E4m3> = true;

// 16 columns of a row, as pairs of f16, in the order that multiply_abt_fp8() wants: the chunks for
// the first eight places and for the others.
struct Fp8Order {
  uint4 first, second;

  __device__ explicit Fp8Order(const uint32_t (&pairs)[8])
      : first(make_uint4(pairs[0], pairs[2], pairs[4], pairs[6])),
        second(make_uint4(pairs[1], pairs[3], pairs[5], pairs[7])) {}
};

// acc += A B^T: 16 rows of A from `row` on, in Fp8Order; B rows [0, 8 kN).
template <class TileA, class TileB, int kN, int kHeld>
__device__ inline void multiply_abt_fp8(Accumulators<1, kN>& acc, uint32_t a_smem, uint32_t b_smem,
                                        int row, int lane, const HeldA<1, kHeld>& held) {
  static_assert(TileA::kCols == 2 * TileB::kCols, "shapes must agree");
  const uint32_t a_lane = a_smem + TileA::offset(row + lane % 16, lane / 16);
  const uint32_t b_lane = b_smem + TileB::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < TileA::kCols / 16; k += 2) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (k < kHeld) {
        held.get(a[i], k + i, 0);
      } else {
        ptx::ldmatrix_x4(a[i], walk<TileA>(a_lane, 0, 2 * (k + i)));
      }
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];  // steps k and k + 1 of eight rows, then of eight more
      ptx::ldmatrix_x4(b, walk<TileB>(b_lane, 8 * n, k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t low, high;
        ptx::unpack_e4m3(low, high, b[i]);
        ptx::mma_m16n8k16<ptx::Half>(acc.c[0][n + i / 2], a[i % 2], low, high);
      }
    }
  }
}

// acc += P B: B of kN x 8 columns. Of 16 columns the first accumulator has the even ones,
// the second the odd ones.
template <class TileB, int kP, int kN>
__device__ inline void multiply_pb_fp8(Accumulators<1, kN>& acc, const Accumulators<1, kP>& p,
                                       uint32_t b_smem, int lane) {
  static_assert(2 * TileB::kCols == kN * 8 && TileB::kRows == kP * 8, "shapes must agree");
  const ColumnsOfB<TileB, kN / 2> columns(b_smem, 0, lane);
#pragma unroll
  for (int k = 0; k < kP / 2; ++k) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = p.c[0][2 * k + i / 2];
      a[i] = ptx::pack<ptx::Half>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t b[4];  // rows [0, 8) and [8, 16) of 16 columns, then of 16 more
      columns.load(b, k, n / 2);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        // Of two columns and rows r, r + 1: both rows of the even column, then of the odd one.
        uint32_t even[2], odd[2];
        ptx::unpack_e4m3(even[0], odd[0], ptx::choose_bytes<0x3120>(b[i], 0));
        ptx::unpack_e4m3(even[1], odd[1], ptx::choose_bytes<0x3120>(b[i + 1], 0));
        ptx::mma_m16n8k16<ptx::Half>(acc.c[0][n + i], a, even[0], even[1]);
        ptx::mma_m16n8k16<ptx::Half>(acc.c[0][n + i + 1], a, odd[0], odd[1]);
      }
    }
  }
}

}  // namespace flash::tile
