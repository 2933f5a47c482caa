// Which tile a CTA computes.
#pragma once

#include "host/flash.h"

namespace flash::attn {

// Tiles are numbered so that the long ones start first and CTAs that run together share K and V: heads
// come in sections small enough for L2; within a section all heads of the last rows come first.
struct TileIndex {
  int block_m, head, sequence, split;

  __device__ TileIndex(int index, int num_blocks, int hq, int b, int num_splits, int section) {
    const int heads = hq * b;
    const int per_split = num_blocks * heads;
    split = num_splits > 1 ? index / per_split : 0;
    index -= split * per_split;
    const int first = index / (num_blocks * section) * section;
    const int size = min(section, heads - first);
    index -= first * num_blocks;
    block_m = num_blocks - 1 - index / size;
    const int at = first + index % size;
    sequence = at / hq;
    head = at - sequence * hq;
  }
};

}  // namespace flash::attn
