// What a warp's rows see of a block of scores.
#pragma once

#include "attn/scores.cuh"
#include "sm90/own.cuh"
#include "sm90/parts.cuh"

namespace flash::sm90 {

// Of a consumer's rows, the upper one of this lane's scores; the other one is 8 below.
__device__ inline int own_row() { return Own::warp_row() + Own::lane() / 4; }
// The first key of its scores of a block.
template <int kBlockN>
__device__ inline int first_key(int key_block) {
  return key_block * kBlockN + Own::lane() % 4 * 2;
}

template <int kBlockN>
__device__ inline bool sees_all(const Tile& t, int consumer, int key_block) {
  const attn::Keys seen = t.seen_by_all[consumer];
  return seen.begin <= key_block * kBlockN && seen.end >= (key_block + 1) * kBlockN;
}

// No row of the consumer sees more than the first kFew keys of the block.
template <int kBlockN, int kFew, class AnyTile>
__device__ inline bool sees_few(const Scores& scores, const AnyTile& t, int consumer,
                                int key_block) {
  const int last_row = min(first_query(t, consumer) + kBoxM, t.sq) - 1;
  const int end = attn::Mask(scores, t.sq, t.sk).in_window(last_row).end;
  return ptx::uniform(end <= key_block * kBlockN + kFew);
}

// How many blocks, from the one in front of this down, all rows see to the full, and have seen a
// key behind them; below 1 there is none. Int: the type of what is divided. In FP8's tile of most
// scores ptxas spills a signed one.
template <int kBlockN, class Int = int>
__device__ inline int whole_run(const Tile& t, int consumer, int key_block) {
  const attn::Keys seen = t.seen_by_all[consumer];
  if (seen.end <= key_block * kBlockN) return 0;
  return key_block - static_cast<Int>(seen.begin + kBlockN - 1) / kBlockN;
}

// In pieces of at most 64 keys, because a consumer has 64 rows: of a block of 128 that the diagonal
// crosses, one piece is hidden from all rows of a consumer, or seen by all of them. What is hidden
// needs no exponentials, what is seen no mask.
template <int kBlockN>
struct SightOf {
  static constexpr int kPieces = (kBlockN + 63) / 64;
  static constexpr int kGroups = kBlockN / 8 / kPieces;  // accumulators of a piece
  static constexpr int kBits = 2 * kGroups;
  static constexpr uint32_t kPiece = (1 << kBits) - 1;

  uint32_t row[2];  // of each row of this lane, a bit for each entry

  __device__ void see_all() { row[0] = row[1] = 0xffffffffu; }

  template <class AnyTile>
  __device__ __forceinline__ void look(const Scores& scores, const AnyTile& t, int consumer,
                                       int key_block) {
    if (sees_all<kBlockN>(t, consumer, key_block)) {
      see_all();
    } else {
      const int row = own_row();
      const int first = first_query(t, consumer);
      const int queries[2] = {query_of(t, first, row), query_of(t, first, row + 8)};
      see(attn::Mask(scores, t.sq, t.sk), queries, first_key<kBlockN>(key_block));
    }
  }

  // Of the block in which this lane has these queries, and keys from `col` on.
  __device__ __forceinline__ void see(const attn::Mask& mask, const int (&queries)[2], int col) {
    static_assert(kPieces * kGroups * 8 == kBlockN && kBlockN <= 128, "equal pieces of few bits");
    attn::Keys keys[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) keys[h] = mask.in_window(queries[h]);
    // Apart, because it divides.
    if (mask.chunk > 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) keys[h] = {mask.lowest(queries[h]), mask.highest(queries[h])};
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = attn::entries_below(keys[h].end - col) & ~attn::entries_below(keys[h].begin - col);
    }
  }

  // Which pieces some row sees some of; the same for all lanes of a warp.
  __device__ __forceinline__ void find_seen(bool (&seen)[kPieces]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      seen[i] = __any_sync(0xffffffffu, ((row[0] | row[1]) >> kBits * i & kPiece) != 0);
    }
  }

  // Sets hidden scores to -inf, but in pieces that are not `seen` to 0, which is what p will be.
  __device__ __forceinline__ void hide(tile::Accumulators<1, kBlockN / 8>& s,
                                       const bool (&seen)[kPieces]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool hides = ((row[0] & row[1]) >> kBits * i & kPiece) != kPiece;
      if (!__any_sync(0xffffffffu, hides)) continue;
      const float hidden = seen[i] ? -attn::infinity() : 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t bits = row[h] >> kBits * i;
#pragma unroll
        for (int bit = 0; bit < kBits; ++bit) {
          float& x = s.c[0][kGroups * i + bit / 2][2 * h + bit % 2];
          if (!(bits & 1u << bit)) x = hidden;
        }
      }
    }
  }
};

}  // namespace flash::sm90
