// Tile sizes of the decode family: the one place that knows them, read by the kernels and by the
// host.
#pragma once

#include "device/common/arch.h"

namespace flash::decode {

constexpr int kMostInCluster = 16;  // CTAs
constexpr int kFewInCluster = 4;    // of several sequences, of more than few blocks
// So many blocks of a CTA take no longer than fewer of them and merging in memory do. Of one
// sequence less, if the CTAs of one cluster a head are so few that reading waits for each of them.
constexpr int kFewBlocks = 8;
constexpr int few_blocks(int ctas) { return ctas < 64 ? 2 : kFewBlocks; }

// Whether several sequences may have clusters, of tiles of so many rows.
constexpr bool many_have_clusters(int rows) { return rows == 16; }

struct Tile {
  int rows;  // queries times heads of a group
  int head_dim;
  int warps;
  int block_n;
  int stages;             // blocks of K and V in shared memory
  int ctas;               // an SM
  int element_bytes = 2;  // of K and V

  constexpr int threads() const { return warps * 32; }
  // Q; behind it, eight rows of O of every warp.
  constexpr int scratch_bytes() const {
    const int q = rows * head_dim * 2;
    const int o = warps * 8 * head_dim * 4;
    return q > o ? q : o;
  }
  constexpr int ring_bytes() const { return 2 * stages * block_n * head_dim * element_bytes; }
  // The ring, scratch, two statistics of each warp's rows, a flag and a barrier.
  constexpr int smem_bytes() const { return ring_bytes() + scratch_bytes() + warps * 16 * 8 + 16; }
  // Four columns of a row, with the row's statistics, that a CTA of a cluster gets from others.
  constexpr int quads() const { return rows * head_dim / 4 + kMostInCluster; }
  // They come to where the ring was.
  constexpr bool merges_in_clusters() const { return quads() * (16 + 8) <= ring_bytes(); }
};

// For each number of rows and head dim the preferred tile first: the first that fits is used.
constexpr Tile kTiles[] = {
    {16, 64, 8, 128, 6, 1},   //
    {16, 64, 4, 64, 6, 2},    //
    {16, 64, 4, 64, 4, 2},    //
    {16, 64, 4, 64, 2, 2},    //
    {16, 96, 8, 128, 4, 1},   //
    {16, 96, 4, 64, 4, 2},    //
    {16, 96, 4, 64, 2, 2},    //
    {16, 96, 4, 64, 2, 1},    //
    {16, 128, 8, 128, 3, 1},  //
    {16, 128, 4, 64, 3, 2},   //
    {16, 128, 4, 64, 2, 2},   //
    {16, 128, 4, 64, 2, 1},   //
    {16, 192, 4, 64, 4, 1},   //
    {16, 192, 4, 64, 2, 1},   //
    {16, 192, 2, 32, 2, 1},   //
    {16, 256, 4, 64, 3, 1},   //
    {16, 256, 4, 64, 2, 1},   //
    {16, 256, 2, 32, 2, 1},   //
    {64, 64, 4, 64, 6, 2},    //
    {64, 64, 4, 64, 4, 2},    //
    {64, 64, 4, 64, 2, 2},    //
    {64, 96, 4, 64, 4, 2},    //
    {64, 96, 4, 64, 2, 2},    //
    {64, 96, 4, 64, 2, 1},    //
    {64, 128, 4, 64, 3, 2},   //
    {64, 128, 4, 64, 2, 2},   //
    {64, 128, 4, 64, 2, 1},   //
    {64, 192, 4, 32, 8, 1},   //
    {64, 192, 4, 32, 5, 1},   //
    {64, 192, 4, 32, 2, 1},   //
    {64, 256, 4, 32, 6, 1},   //
    {64, 256, 4, 32, 4, 1},   //
    {64, 256, 4, 32, 2, 1},   //
};

// Of elements of 8 bits a ring holds a third more blocks, in fewer bytes: more do not pay.
constexpr Tile tile(int rows, int head_dim, int cc, int element_bytes = 2) {
  for (Tile tile : kTiles) {
    const int smem = tile.ctas * (tile.smem_bytes() + 1024);
    if (tile.rows != rows || tile.head_dim != head_dim || smem > common::smem_of_sm(cc)) continue;
    if (element_bytes == 1) tile.stages = tile.stages * 4 / 3;
    tile.element_bytes = element_bytes;
    return tile;
  }
  return {};
}

}  // namespace flash::decode
