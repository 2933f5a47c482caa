// Tile sizes of the sm80 family: the one place that knows them, read by the kernels and by the
// host.
#pragma once

#include "device/common/arch.h"

namespace flash::sm80 {

using common::kArch;
using common::smem_of_sm;

struct ForwardTile {
  int head_dim;
  int block_m;
  int block_n;
  int warps;
  int stages;  // buffers of K and V: 1 or 2
  int held;    // steps of 16 columns of Q that stay in registers
  int ctas;    // an SM

  constexpr int threads() const { return warps * 32; }
  constexpr int rows_per_warp() const { return block_m / warps; }
  // Q; K and V in stages. O leaves through Q's.
  constexpr int smem_bytes() const { return (block_m + 2 * stages * block_n) * head_dim * 2; }
};

// For each head dim the preferred tile first: the first that fits is used.
constexpr ForwardTile kForwardTiles[] = {
    {64, 128, 128, 4, 2, 0, 2},  //
    {64, 128, 64, 4, 2, 0, 2},   //
    {96, 128, 64, 4, 2, 0, 2},   //
    {96, 128, 64, 4, 1, 0, 2},   //
    {128, 128, 64, 4, 2, 0, 2},  //
    {128, 128, 64, 4, 1, 0, 2},  //
    {128, 128, 32, 4, 1, 0, 2},  //
    {192, 64, 64, 4, 1, 12, 2},  //
    {192, 64, 32, 4, 1, 12, 2},  //
    {256, 64, 64, 4, 1, 10, 2},  //
    {256, 64, 32, 4, 1, 8, 2},   //
    {256, 64, 32, 4, 1, 8, 1},   //
};

constexpr ForwardTile forward_tile(int head_dim, int cc) {
  for (const ForwardTile& tile : kForwardTiles) {
    const int smem = tile.ctas * (tile.smem_bytes() + 1024);
    if (tile.head_dim == head_dim && smem <= smem_of_sm(cc)) return tile;
  }
  return {};
}

struct BackwardTile {
  int head_dim;
  int block_m;  // queries of a step
  int block_n;  // keys of a CTA
  int warps;
  int warps_s;   // warps along the queries of S and dP; the others share their keys
  int warps_kv;  // warps along the keys of dK and dV; the others share their columns
  int warps_q;   // warps along the queries of dQ; the others share its columns
  int stages;    // buffers of Q and dO: 1 or 2
  int ctas;      // an SM

  constexpr int threads() const { return warps * 32; }
  // Q and dO in stages with lse and delta; K and V; P and dS.
  constexpr int smem_bytes() const {
    return stages * block_m * (2 * head_dim * 2 + 2 * 4) + 2 * block_n * head_dim * 2 +
           2 * block_m * block_n * 2;
  }
};

// For each head dim the preferred tile first: the first that fits is used.
constexpr BackwardTile kBackwardTiles[] = {
    {64, 128, 128, 8, 4, 4, 4, 2, 1},  //
    {64, 64, 128, 8, 2, 4, 2, 1, 1},   //
    {96, 64, 128, 8, 2, 4, 4, 2, 1},   //
    {96, 64, 64, 8, 2, 4, 4, 1, 1},    //
    {128, 64, 128, 8, 2, 4, 2, 2, 1},  //
    {128, 64, 64, 8, 2, 2, 2, 1, 1},   //
    {192, 64, 64, 8, 2, 2, 2, 2, 1},   //
    {192, 32, 64, 8, 2, 2, 2, 1, 1},   //
    {256, 64, 64, 8, 2, 2, 2, 2, 1},   //
    {256, 64, 64, 8, 2, 2, 2, 1, 1},   //
    {256, 32, 32, 4, 2, 1, 2, 1, 1},
};

constexpr BackwardTile backward_tile(int head_dim, int cc) {
  for (const BackwardTile& tile : kBackwardTiles) {
    const int smem = tile.ctas * (tile.smem_bytes() + 1024);
    if (tile.head_dim == head_dim && smem <= smem_of_sm(cc)) return tile;
  }
  return {};
}

}  // namespace flash::sm80
