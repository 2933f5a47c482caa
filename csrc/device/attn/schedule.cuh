// Which tile a CTA computes.
#pragma once

#include "attn/mask.cuh"

namespace flash::attn {

// Tiles are numbered so that the long ones start first and CTAs that run together share K and V:
// heads come in sections small enough for L2; within a section all heads of the last rows come
// first.
struct TileIndex {
  int block_m, head, sequence;

  __device__ TileIndex() {}

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

// Of the blocks that a tile takes, those of one part. Some parts may have none.
__device__ inline Keys part_of(Keys blocks, int split, uint32_t num_splits) {
  if (num_splits <= 1) return blocks;
  const uint32_t count = max(blocks.end - blocks.begin, 0);
  const int of_part = (count + num_splits - 1) / num_splits;
  const int begin = blocks.begin + split * of_part;
  return {begin, min(blocks.end, begin + of_part)};
}

// Row 0 of a sequence in a part: parts have dense rows, [split, b, hq, sq].
__device__ inline int64_t row_of_part(const ForwardParams& params, int split, int sequence,
                                      int head) {
  const int64_t heads = (int64_t{split} * params.seqs.b + sequence) * params.hq + head;
  return heads * params.seqs.sq;
}

// The key-value head of a query head.
__device__ inline int key_head(uint32_t head, uint32_t hq, uint32_t hk) {
  return hq == hk ? head : head / (hq / hk);
}

}  // namespace flash::attn
