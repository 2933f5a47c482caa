// First step of the backward pass: delta = rowsum(dout * o), and zeroed sums for dQ; or, where the
// main kernel wants them, statistics and turns (host/flash.h).
//
// A CTA takes kDeltaRows rows of one head, a warp 32 of them, 8 lanes a row with 16-byte loads;
// rows behind the sequence, up to where the next one starts, get zero. Bound by memory: reads o and
// dout, writes dq_accum.
#pragma once

#include "attn/mask.cuh"
#include "attn/schedule.cuh"
#include "attn/sequence.cuh"
#include "attn/softmax.cuh"
#include "common/config.h"
#include "common/order.cuh"
#include "ptx/math.cuh"

namespace flash::common {

// Sum of products of eight pairs of 16-bit values.
template <class T>
__device__ inline float dot(uint4 a, uint4 b) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w};
  const uint32_t right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = ptx::unpack<T>(left[i]);
    const float2 y = ptx::unpack<T>(right[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  return sum;
}

// Over eight lanes, of each of their eight sums: a lane gets the one whose place is its own.
__device__ inline float add_up(float (&sums)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool is_upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = is_upper ? sums[i] : sums[half + i];
      sums[i] = is_upper ? sums[half + i] : sums[i];
      sums[i] += __shfl_xor_sync(0xffffffffu, given, half);
    }
  }
  return sums[0];
}

// What the main kernel takes of a row: its log-sum-exp in base 2, such that P is 0 where there is
// no row, or one without keys.
__device__ inline float lse_of_row(const BackwardParams& params, const attn::Sequence& seq,
                                   int head, int row) {
  if (row >= seq.sq) return attn::infinity();
  const int64_t batch = params.seqs.cu_seqlens_q ? 0 : seq.index * params.lse_batch;
  const float lse = params.lse[batch + head * params.lse_head + seq.first_q + row];
  return lse == -attn::infinity() ? attn::infinity() : lse * attn::kLog2e;
}

// A warp's work: the place of a sequence in BackwardParams::order, which goes by queries.
__device__ inline void find_place(const BackwardParams& params, const attn::Sequence& own) {
  const auto blocks_of = [&](const attn::Sequence& seq) -> uint32_t {
    return (seq.sk + params.turn_keys - 1) / params.turn_keys * params.hk;
  };
  const Count found = count(params.seqs, blocks_of, [&](const attn::Sequence& seq) {
    return seq.sq > own.sq || (seq.sq == own.sq && seq.index < own.index);
  });
  if (threadIdx.x % 32 != 0) return;
  uint32_t* const place = params.order + 2 * found.sequences;
  place[0] = own.index;
  place[1] = found.blocks;
  const bool is_last = found.sequences + 1 == static_cast<uint32_t>(params.seqs.b);
  if (is_last) place[3] = found.blocks + blocks_of(own);
}

constexpr int kTileRows = 64;  // of statistics and turns

// Whether there may be sums that nobody stores, of the rows from `first` on that a CTA takes: of
// some tile the first one sees no key.
__device__ inline bool may_lack_sums(const BackwardParams& params, const attn::Sequence& seq,
                                     int first) {
  const attn::Mask mask(params.scores, seq.sq, seq.sk);
  bool lacks = false;
  for (int row = first; row < first + kDeltaRows; row += kTileRows) {
    lacks = lacks || (row < seq.sq && mask.lowest(row) >= mask.highest(row));
  }
  return lacks;
}

// Of keys that queries about `row` see.
__device__ inline int last_block(const BackwardParams& params, const attn::Sequence& seq, int row) {
  const int last_row = (row / params.turn_rows + 1) * params.turn_rows - 1;
  const attn::Mask mask(params.scores, seq.sq, seq.sk);
  return (mask.highest(last_row) - 1) / params.turn_keys;
}

// Grid: CTAs of a head (as many as the longest head has tiles of rows), times hq, times b.
template <class T>
__device__ inline void delta(const BackwardParams& params) {
  ptx::let_kernel_behind_begin();
  if (params.next_block && blockIdx.x == 0 && threadIdx.x == 0) {
    params.next_block[0] = params.next_block[1] = 0;
  }
  const int blocks = gridDim.x / (params.hq * params.seqs.b);
  // The first heads come last: the main kernel begins with what is in L2.
  const int index = gridDim.x - 1 - blockIdx.x;
  const int head = index % params.hq;
  const int block = index / params.hq % blocks;
  const attn::Sequence seq(params.seqs, index / (params.hq * blocks));
  const attn::PaddedRows padded(params, seq.index, head);
  const uint16_t* o = attn::rows_of_q(params.o, params.seqs, seq, head);
  const uint16_t* dout = attn::rows_of_q(params.dout, params.seqs, seq, head);
  const int lane = threadIdx.x % 8;
  float* statistics = nullptr;
  if (params.statistics) {
    statistics = params.statistics +
                 2 * attn::PaddedRows(params, seq.index, head, params.statistics_head).first;
  }

  if (params.finished && block == 0 && threadIdx.x == 0 && head < params.hk) {
    const int at = seq.index * params.hk + head;
    params.finished[at] = params.zeroed[at] = 0;
  }
  if (params.order && block == 0 && head == 0 && threadIdx.x < 32) find_place(params, seq);
  const int key_head = attn::key_head(head, params.hq, params.hk);
  const bool is_zeroed = seq.index * params.hk + key_head < params.heads_zeroed;
  const int end_used = (seq.sq + 127) / 128 * 128;  // by the main kernel
  for (int first = block * kDeltaRows; first < padded.count; first += blocks * kDeltaRows) {
    const int end = min(first + kDeltaRows, padded.count);
    const bool zeroes = is_zeroed || (params.turns && may_lack_sums(params, seq, first));
    for (int copy = 0; zeroes && copy < params.dq_copies; ++copy) {
      float* sums =
          params.dq_accum + copy * params.dq_accum_copy + (padded.first + first) * params.dq_cols;
      for (int at = 4 * threadIdx.x; at < (end - first) * params.dq_cols; at += 4 * kDeltaThreads) {
        *reinterpret_cast<float4*>(sums + at) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
    // All loads are under way before the first is waited for.
    constexpr int kPasses = 8, kRowsPerPass = 4;
    const int first_of_warp = first + threadIdx.x / 32 * (kPasses * kRowsPerPass);
    const int first_of_lane = first_of_warp + threadIdx.x % 32 / 8;
    const int own = first_of_lane + lane * kRowsPerPass;
    const bool is_used = statistics && own < end_used;
    const float lse = is_used ? lse_of_row(params, seq, head, own) : 0.0f;
    float sums_of_rows[kPasses] = {};
    for (int col = 8 * lane; col < params.dv; col += 64) {
      uint4 left[kPasses] = {};
      uint4 right[kPasses] = {};
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = first_of_lane + pass * kRowsPerPass;
        if (row < seq.sq) {
          left[pass] = *reinterpret_cast<const uint4*>(o + row * params.o.row + col);
          right[pass] = *reinterpret_cast<const uint4*>(dout + row * params.dout.row + col);
        }
      }
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        sums_of_rows[pass] += dot<T>(left[pass], right[pass]);
      }
    }
    const float x = add_up(sums_of_rows, lane);
    if (own < end) params.delta[padded.first + own] = x;
    if (is_used) {
      float* const tile = statistics + 2 * (own / kTileRows * kTileRows) + own % kTileRows;
      tile[0] = lse;
      tile[kTileRows] = -x;
    }
    if (params.turns && threadIdx.x < 2 * kDeltaRows / kTileRows) {
      const int row = first + static_cast<int>(threadIdx.x) / 2 * kTileRows;
      if (row < end_used) {
        params.turns[(padded.first + row) / kTileRows * 2 + threadIdx.x % 2] =
            params.deterministic ? ~last_block(params, seq, row) : kNothingIsThere;
      }
    }
  }
}

}  // namespace flash::common
