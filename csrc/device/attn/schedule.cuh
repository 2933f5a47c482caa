// Which tile a CTA computes.
#pragma once

#include "host/flash.h"

namespace flash::attn {

// Tiles are numbered so that the long ones start first and CTAs that run together share K and V:
// heads come in sections small enough for L2; within a section all heads of the last rows come
// first.
struct TileIndex {
  int block_m, head, sequence;

  // A division costs a hundred clocks, so the usual call has two.
  __device__ TileIndex(uint32_t index, uint32_t num_blocks, uint32_t hq, uint32_t b,
                       uint32_t section) {
    const uint32_t heads = hq * b;
    uint32_t first = 0;
    uint32_t size = heads;
    if (section < heads) {
      first = index / (num_blocks * section) * section;
      size = min(section, heads - first);
      index -= first * num_blocks;
    }
    find(index, num_blocks, hq, first, size);
  }

  // The same where section `last` has all heads behind it too.
  __device__ TileIndex(uint32_t index, uint32_t num_blocks, uint32_t hq, uint32_t b,
                       uint32_t section, uint32_t last) {
    const uint32_t heads = hq * b;
    const uint32_t at = min(index / (num_blocks * section), last);
    const uint32_t first = at * section;
    const uint32_t size = at == last ? heads - first : min(section, heads - first);
    find(index - first * num_blocks, num_blocks, hq, first, size);
  }

 private:
  // In a section of `size` heads from `first` on.
  __device__ void find(uint32_t index, uint32_t num_blocks, uint32_t hq, uint32_t first,
                       uint32_t size) {
    const uint32_t row = index / size;
    block_m = num_blocks - 1 - row;
    const uint32_t at = first + index - row * size;
    sequence = at / hq;
    head = at - sequence * hq;
  }
};

// The part of a call in `num_splits` parts that this CTA computes: one part stands behind the
// other.
__device__ inline int split_index(uint32_t num_splits) {
  return num_splits > 1 ? blockIdx.x / (gridDim.x / num_splits) : 0;
}

// The key-value head of a query head.
__device__ inline int key_head(uint32_t head, uint32_t hq, uint32_t hk) {
  return hq == hk ? head : head / (hq / hk);
}

}  // namespace flash::attn
