// Scores of a block once more, by one warp alone.
//
// Where the lazy maximum lets p overflow, the scores are gone, and so may be the block of K: its
// buffer was given back. The warp takes Q from shared memory, where it stays as long as its tile,
// and K from global memory. Slow, and rare: after it, the rest of the tile is done the ordinary
// way.
#pragma once

#include "attn/sequence.cuh"
#include "sm90/pipeline.cuh"
#include "tile/products.cuh"

namespace flash::sm90 {

// First element of a sequence's row 0 of K.
__device__ inline const uint16_t* keys_of(const ForwardParams& params, const Tile& tile) {
  return static_cast<const uint16_t*>(params.k.ptr) + tile.batch_k * params.k.batch +
         tile.first_k * params.k.row + tile.head_k * params.k.head;
}

// s = Q K^T for rows [row, + 16) of a consumer's Q and a block of keys from `first` on, all of
// which exist.
template <class Cfg>
__device__ __forceinline__ void recompute(typename Cfg::AccS& s, const ForwardParams& params,
                                          const Tile& tile, uint32_t q_smem, int row, int first,
                                          int lane) {
  using TileQ = typename Cfg::TileQ;
  constexpr int kAtOnce = 2;  // steps whose loads run side by side: registers are few
  // A lane holds keys l / 4 of every 8, columns 2 (l % 4) and 8 further of every 16.
  const uint16_t* key = keys_of(params, tile) + (first + lane / 4) * params.k.row + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < Cfg::kBlockN / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.c[0][n][i] = 0.0f;
#pragma unroll 1
    for (int first_k = 0; first_k < Cfg::kHeadDim / 16; first_k += kAtOnce) {
      uint32_t b[kAtOnce][2];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * (first_k + k) + 8 * half;
          b[k][half] = column < params.d ? *reinterpret_cast<const uint32_t*>(key + column) : 0;
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        uint32_t a[4];
        const int chunk = 2 * (first_k + k) + lane / 16;
        ptx::ldmatrix_x4(a, q_smem + TileQ::offset(row + lane % 16, chunk));
        ptx::mma_m16n8k16<typename Cfg::T>(s.c[0][n], a, b[k][0], b[k][1]);
      }
    }
    key += 8 * params.k.row;
  }
}

}  // namespace flash::sm90
