// What mma.m16n8k16 accumulates, for the tile of a warp.
//
// Of an m16n8 accumulator, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next:
// c[0], c[1] of the first row, c[2], c[3] of the second. Two neighbouring accumulators, packed to
// 16 bits, are just the A operand of a k16 step: that is how P feeds P V without leaving registers.
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

}  // namespace flash::tile
