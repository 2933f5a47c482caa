// Calls whose keys are cut into parts: where a tile's results go.
#pragma once

#include "attn/schedule.cuh"
#include "sm90/pipeline.cuh"

namespace flash::sm90 {

template <class Cfg>
__device__ inline bool is_split(const ForwardParams& params) {
  return Cfg::kMaySplit && params.num_splits > 1;
}

// Row 0 of a tile's sequence among those of parts.
__device__ inline int64_t row_of_part(const ForwardParams& params, const TileOf<true>& tile) {
  return attn::row_of_part(params, tile.split, tile.sequence, tile.head);
}

// Where the log-sum-exps of a tile go, from row 0 of its sequence on.
template <bool kMaySplit>
__device__ inline float* lse_of(const ForwardParams& params, const TileOf<kMaySplit>& tile) {
  if constexpr (kMaySplit) {
    if (params.num_splits > 1) return params.lse_partial + row_of_part(params, tile);
  }
  return params.lse + tile.batch_q * params.lse_batch + tile.head * params.lse_head + tile.first_q;
}

}  // namespace flash::sm90
