// S_dmask, what tests look at: exp(score - maximum of the row), negative where dropout drops.
//
// A warp takes 16 rows of one head and goes over the keys they see twice: for the maxima, then for
// the values. Operands come straight from global memory in fragment layout, so this needs no shared
// memory and no tile table; it is simple, not fast. Blocks of keys that none of the rows sees, and
// rows behind the sequence, are not written: the caller zeroes them.
#pragma once

#include "attn/dropout.cuh"
#include "attn/scores.cuh"
#include "attn/sequence.cuh"
#include "common/config.h"

namespace flash::common {

// Scores of 16 rows against 32 keys, in accumulator layout.
using ScoreBlock = tile::Accumulators<1, 4>;

// The smallest normal number of a type: an entry that is visible keeps its sign.
template <class T>
__device__ inline float smallest_normal();

template <>
__device__ inline float smallest_normal<ptx::Half>() {
  return 6.103515625e-05f;
}

template <>
__device__ inline float smallest_normal<ptx::Bfloat16>() {
  return 1.1754943508222875e-38f;
}

// Elements `col` and `col` + 1 of a row, or zeros behind the head dim.
__device__ inline uint32_t load_pair(const uint16_t* row, int col, int num_cols) {
  return col < num_cols ? *reinterpret_cast<const uint32_t*>(row + col) : 0;
}

// One head's scores; rows and keys behind the end are those at the end.
template <class T>
struct HeadScores {
  const ForwardParams& params;
  const attn::Sequence& seq;
  const attn::Mask mask;
  const attn::ScoreRule rule;
  const uint16_t* q;
  const attn::KeyRows k;
  int row0, lane;

  __device__ HeadScores(const ForwardParams& params, const attn::Sequence& seq, int head, int row0,
                        int lane)
      : params(params),
        seq(seq),
        mask(params.scores, seq.sq, seq.sk),
        rule(params.scores, seq.index, head),
        q(attn::rows_of_q(params.q, params.seqs, seq, head)),
        k(params.k, params.seqs, seq, head / (params.hq / params.hk)),
        row0(row0),
        lane(lane) {}

  __device__ const uint16_t* query(int row) const {
    return q + min(row, seq.sq - 1) * params.q.row;
  }

  __device__ const uint16_t* key(int row) const {
    return k.table ? k.paged_row(row, seq.sk) : k.base + min(row, seq.sk - 1) * k.row_stride;
  }

  // Keys [first, first + 32).
  __device__ void compute(ScoreBlock& s, int first) const {
    s.clear();
    const uint16_t* rows[2] = {query(row0 + lane / 4), query(row0 + lane / 4 + 8)};
    const uint16_t* keys[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) keys[n] = key(first + 8 * n + lane / 4);
    for (int step = 0; step < params.d; step += 16) {
      const int col = step + lane % 4 * 2;
      const uint32_t a[4] = {load_pair(rows[0], col, params.d), load_pair(rows[1], col, params.d),
                             load_pair(rows[0], col + 8, params.d),
                             load_pair(rows[1], col + 8, params.d)};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        ptx::mma_m16n8k16<T>(s.c[0][n], a, load_pair(keys[n], col, params.d),
                             load_pair(keys[n], col + 8, params.d));
      }
    }
    const int row = row0 + lane / 4;
    const int col = first + lane % 4 * 2;
    if (!rule.is_plain) attn::transform(s, rule, mask, row, col);
    attn::hide(s, mask, row, col);
  }
};

// Writes 16 rows x 32 keys from key `first` on.
template <class T>
__device__ inline void store_block(const ForwardParams& params, const attn::Dropout& dropout,
                                   const HeadScores<T>& scores, const ScoreBlock& s,
                                   const float (&maximum)[2], uint16_t* head, int first) {
  uint32_t words[4];
  dropout.bytes(words, scores.row0, first, scores.lane);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = scores.row0 + scores.lane / 4 + 8 * h;
    if (row >= scores.seq.sq) continue;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float x[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float score = s.c[0][n][2 * h + i];
        const float p = fmaxf(ptx::ex2((score - maximum[h]) * scores.rule.softmax_scale_log2),
                              smallest_normal<T>());
        const float sign = dropout.keeps(words, h, n, i) ? 1.0f : -1.0f;
        x[i] = score == -attn::infinity() ? 0.0f : sign * p;
      }
      const int col = first + 8 * n + scores.lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(head + static_cast<int64_t>(row) * params.s_dmask_cols + col) =
          ptx::pack<T>(x[0], x[1]);
    }
  }
}

// Grid: tiles of kSDmaskRows rows times hq times b.
template <class T>
__device__ inline void s_dmask(const ForwardParams& params) {
  const int tiles = (params.seqs.sq + kSDmaskRows - 1) / kSDmaskRows;
  const int head = blockIdx.x / tiles % params.hq;
  const attn::Sequence seq(params.seqs, blockIdx.x / tiles / params.hq);
  const int row0 = blockIdx.x % tiles * kSDmaskRows + threadIdx.x / 32 * 16;
  if (row0 >= seq.sq) return;
  const HeadScores<T> scores(params, seq, head, row0, threadIdx.x % 32);
  const int begin = scores.mask.lowest(row0) / 32 * 32;
  const int end = scores.mask.highest(min(row0 + 15, seq.sq - 1));

  ScoreBlock s;
  float maximum[2] = {-attn::infinity(), -attn::infinity()};
  for (int first = begin; first < end; first += 32) {
    scores.compute(s, first);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) maximum[i / 2] = fmaxf(maximum[i / 2], s.c[0][n][i]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    maximum[h] = fmaxf(maximum[h], __shfl_xor_sync(0xffffffffu, maximum[h], 1));
    maximum[h] = fmaxf(maximum[h], __shfl_xor_sync(0xffffffffu, maximum[h], 2));
  }
  const int number = seq.index * params.hq + head;
  const attn::Dropout dropout(params.scores, number);
  uint16_t* to = static_cast<uint16_t*>(params.s_dmask) +
                 static_cast<int64_t>(number) * params.s_dmask_rows * params.s_dmask_cols;
  for (int first = begin; first < end; first += 32) {
    scores.compute(s, first);
    store_block(params, dropout, scores, s, maximum, to, first);
  }
}

}  // namespace flash::common
