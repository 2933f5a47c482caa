// Which query and head a row of a tile is, and where its results go: of heads that share a tile,
// and of keys that are cut into parts.
#pragma once

#include "attn/schedule.cuh"
#include "sm90/pipeline.cuh"

namespace flash::sm90 {

// A consumer has 64 rows: queries of one head, or fewer of each head that shares the tile. What
// remains counts as rows of one more head, which there is not.
__device__ inline int queries_of(const TileOf<false>&) { return 64; }
__device__ inline int queries_of(const TileOf<true>& tile) { return tile.queries; }

// The first query of a consumer.
template <class AnyTile>
__device__ inline int first_query(const AnyTile& tile, int consumer) {
  return tile.row0 + queries_of(tile) * consumer;
}

// Which of the tile's heads a consumer's row belongs to, and the query that it is: `first` is the
// consumer's first one.
__device__ inline int head_of(const TileOf<false>&, int) { return 0; }
__device__ inline int head_of(const TileOf<true>& tile, int row) {
  return static_cast<int>(row * tile.inverse >> 16);
}
template <class AnyTile>
__device__ inline int query_of(const AnyTile& tile, int first, int row) {
  return first + row - head_of(tile, row) * queries_of(tile);
}

template <class Cfg>
__device__ inline int heads_of_tile(const ForwardParams& params) {
  return Cfg::kServesAll ? params.heads_of_tile : 1;
}

template <class Cfg>
__device__ inline bool is_split(const ForwardParams& params) {
  return Cfg::kServesAll && params.num_splits > 1;
}

// Query 0 of a tile's sequence among the rows of parts.
__device__ inline int64_t row_of_part(const ForwardParams& params, const TileOf<true>& tile,
                                      int head) {
  return attn::row_of_part(params, tile.split, tile.sequence, tile.head + head);
}

// Where the log-sum-exps of a tile's first head go, from query 0 of its sequence on, and how far
// behind them the next head's stand.
struct LseRows {
  float* ptr;
  int64_t head;
};
template <bool kServesAll>
__device__ inline LseRows lse_of(const ForwardParams& params, const TileOf<kServesAll>& tile) {
  if constexpr (kServesAll) {
    if (params.num_splits > 1) {
      return {params.lse_partial + row_of_part(params, tile, 0), params.seqs.sq};
    }
  }
  return {params.lse + tile.batch_q * params.lse_batch + tile.head * params.lse_head + tile.first_q,
          params.lse_head};
}

}  // namespace flash::sm90
