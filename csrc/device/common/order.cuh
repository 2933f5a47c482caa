// The order in which sequences of unlike lengths are worked on: the longest first, so that short
// ones fill the gaps at the end.
#pragma once

#include "attn/sequence.cuh"

namespace flash::common {

struct Count {
  uint32_t sequences, blocks;
};

// Sequences that are of a kind, as those in front of one, and all their blocks. All lanes of a warp
// look at sequences, and get the same result.
template <class BlocksOf, class IsCounted>
__device__ inline Count count(const Sequences& seqs, const BlocksOf& blocks_of,
                              const IsCounted& is_counted) {
  Count found = {0, 0};
  for (int i = threadIdx.x % 32; i < seqs.b; i += 32) {
    const attn::Sequence seq(seqs, i);
    if (is_counted(seq)) {
      ++found.sequences;
      found.blocks += blocks_of(seq);
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    found.sequences += __shfl_xor_sync(0xffffffffu, found.sequences, step);
    found.blocks += __shfl_xor_sync(0xffffffffu, found.blocks, step);
  }
  return found;
}

}  // namespace flash::common
