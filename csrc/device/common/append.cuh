// Writes new keys and values into a cache, and rotates them and the queries if asked for.
//
// A warp takes a row of one head: of k_new and v_new first, then of q. Eight elements a lane, 16
// bytes. A slot that the cache does not have (its length, page or row lies outside) is not written,
// and a position behind the rotary table is rotated as its last one; the CPU backend reports both.
// Bound by memory.
#pragma once

#include "attn/new_rows.cuh"
#include "common/config.h"

namespace flash::common {

// Which row of which sequence a warp takes.
struct Place {
  int sequence;  // below zero: none
  int row;       // counted from the sequence's first

  // Of packed row `at`, or row `at` of a batch of `rows` each.
  __device__ Place(const int32_t* cu_seqlens, int b, int rows, int64_t at) {
    if (cu_seqlens) {
      row = static_cast<int>(at);
      sequence = attn::sequence_of_row(cu_seqlens, b, row);
      if (sequence >= 0) row -= cu_seqlens[sequence];
    } else {
      sequence = static_cast<int>(at / rows);
      row = static_cast<int>(at % rows);
    }
  }
};

// Moves a row to global memory.
template <class T>
__device__ inline void copy_row(uint16_t* to, const uint16_t* from, int width, int position,
                                const NewRows& rules, int lane) {
  const auto put = [&](int col, uint4 x) { *reinterpret_cast<uint4*>(to + col) = x; };
  attn::move_row<T>(put, from, width, position, rules, lane);
}

template <class T>
__device__ inline void append_row(const AppendParams& params, int64_t at, int head, int lane) {
  const NewRows& added = params.added;
  const Place place(added.cu_seqlens, params.seqs.b, added.count, at);
  if (place.sequence < 0) return;
  const int slot = params.seqs.seqused_k[place.sequence] + place.row;
  uint16_t* k = attn::cache_slot(params.k, params.seqs, place.sequence, slot, head);
  uint16_t* v = attn::cache_slot(params.v, params.seqs, place.sequence, slot, head);
  if (k == nullptr) return;
  const int position = attn::position_of_key(added, params.seqs, place.sequence, place.row);
  const auto from = [&](const Rows& x) {
    return attn::row_of(x, added.cu_seqlens, place.sequence, place.row, head);
  };
  copy_row<T>(k, from(added.k), params.d, position, added, lane);
  copy_row<T>(v, from(added.v), params.dv, -1, added, lane);
}

template <class T>
__device__ inline void rotate_query(const AppendParams& params, int64_t at, int head, int lane) {
  const Sequences& seqs = params.seqs;
  const Place place(seqs.cu_seqlens_q, seqs.b, seqs.sq, at);
  if (place.sequence < 0) return;
  const int position = attn::position_of_query(params.added, seqs, place.sequence, place.row);
  const auto row = [&](const Rows& x) {
    return attn::row_of(x, seqs.cu_seqlens_q, place.sequence, place.row, head);
  };
  copy_row<T>(row(params.q_rotated), row(params.q), params.d, position, params.added, lane);
}

// Grid: rows of all sequences times hk, then times hq where queries are rotated, kAppendRows a CTA.
template <class T>
__device__ inline void append(const AppendParams& params) {
  const int lane = threadIdx.x % 32;
  const Sequences& seqs = params.seqs;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kAppendRows + threadIdx.x / 32;
  const int64_t b = seqs.b;
  const int64_t count = params.added.count;
  const int64_t rows_k = params.added.cu_seqlens ? count : b * count;
  const int64_t rows_q = seqs.cu_seqlens_q ? seqs.total_q : b * seqs.sq;
  const int64_t tasks_k = rows_k * params.hk;
  if (task < tasks_k) {
    append_row<T>(params, task / params.hk, static_cast<int>(task % params.hk), lane);
  } else if (params.q_rotated.ptr && task < tasks_k + rows_q * params.hq) {
    const int64_t at = task - tasks_k;
    rotate_query<T>(params, at / params.hq, static_cast<int>(at % params.hq), lane);
  }
}

}  // namespace flash::common
