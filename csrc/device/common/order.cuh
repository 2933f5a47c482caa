// The order in which sequences of unlike lengths are worked on: the longest first, so that short
// ones fill the gaps at the end.
#pragma once

#include "attn/sequence.cuh"

namespace flash::common {

// How many sequences come in front of one in that order, and how many blocks they have together.
struct InFront {
  uint32_t sequences, blocks;
};

// All lanes of a warp look at sequences, and get the same result. Of sequences of one length, those
// of lower index come first.
template <class LengthOf, class BlocksOf>
__device__ inline InFront find_in_front(const Sequences& seqs, const attn::Sequence& own,
                                        const LengthOf& length_of, const BlocksOf& blocks_of) {
  InFront found = {0, 0};
  for (int i = threadIdx.x % 32; i < seqs.b; i += 32) {
    const attn::Sequence seq(seqs, i);
    const int more = length_of(seq) - length_of(own);
    if (more > 0 || (more == 0 && i < own.index)) {
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
