// Where tiles stand in a line of sequences of unlike lengths (common/fill.cuh finds it).
#pragma once

#include "host/flash.h"

namespace flash::attn {

// The place in line of the tile that is taken as number `index`; a block has one for each head.
// Tiles of sequences of one block wait for keys that no other tile reads, where others wait for
// products: so the two kinds take turns, each in its order, as often as they have tiles.
__device__ inline uint32_t place_of(const Line& line, uint32_t heads, uint32_t index) {
  const uint32_t part = line.part_of_lone;
  const uint32_t lone = __umulhi(index, part);  // of those taken before it
  return __umulhi(index + 1, part) > lone ? line.of_several * heads + lone : index - lone;
}

__device__ inline LineBlock* blocks_of(Line* line) {
  return reinterpret_cast<LineBlock*>(line + 1);
}

}  // namespace flash::attn
