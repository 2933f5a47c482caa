// Writes new keys and values into a cache, and rotates them and the queries if asked for.
//
// A warp takes a row of one head: of k_new and v_new first, then of q. Eight elements a lane, 16
// bytes. A slot that the cache does not have (its length, page or row lies outside) is not written,
// and a position behind the rotary table is rotated as its last one; the CPU backend reports both.
// Bound by memory.
#pragma once

#include "attn/sequence.cuh"
#include "common/config.h"
#include "ptx/math.cuh"

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

// Eight elements as floats.
template <class T>
struct Chunk {
  float x[8];

  __device__ explicit Chunk(const void* from) {
    const uint4 words = *static_cast<const uint4*>(from);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ptx::unpack<T>(pairs[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }

  __device__ void store(void* to) const {
    *static_cast<uint4*>(to) = make_uint4(ptx::pack<T>(x[0], x[1]), ptx::pack<T>(x[2], x[3]),
                                          ptx::pack<T>(x[4], x[5]), ptx::pack<T>(x[6], x[7]));
  }
};

// (first, second) turned by the angle of a cosine and a sine.
__device__ inline void turn(float& first, float& second, float cos, float sin) {
  const float turned = first * cos - second * sin;
  second = first * sin + second * cos;
  first = turned;
}

// One row of a head from `from` to `to`, its first rotary_dim elements rotated by row `position` of
// the tables; `position` below zero: as it is.
template <class T>
__device__ inline void move_row(uint16_t* to, const uint16_t* from, int width, int position,
                                const AppendParams& params, int lane) {
  const int rotary_dim = position < 0 ? 0 : params.rotary_dim;
  const int half = rotary_dim / 2;
  const int64_t angles = static_cast<int64_t>(min(position, params.rotary_rows - 1)) * half;
  const uint16_t* cos = static_cast<const uint16_t*>(params.rotary_cos) + angles;
  const uint16_t* sin = static_cast<const uint16_t*>(params.rotary_sin) + angles;
  for (int angle = 8 * lane; angle < half; angle += 8 * 32) {
    // Angles [angle, + 8) turn pairs of neighbours, or of elements half the rotary dim apart.
    const int left = params.rotary_interleaved ? 2 * angle : angle;
    const int right = params.rotary_interleaved ? left + 8 : left + half;
    const Chunk<T> c(cos + angle);
    const Chunk<T> s(sin + angle);
    Chunk<T> a(from + left);
    Chunk<T> b(from + right);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!params.rotary_interleaved) {
        turn(a.x[i], b.x[i], c.x[i], s.x[i]);
      } else if (i < 4) {
        turn(a.x[2 * i], a.x[2 * i + 1], c.x[i], s.x[i]);
      } else {
        turn(b.x[2 * i - 8], b.x[2 * i - 7], c.x[i], s.x[i]);
      }
    }
    a.store(to + left);
    b.store(to + right);
  }
  for (int col = rotary_dim + 8 * lane; col < width; col += 8 * 32) {
    *reinterpret_cast<uint4*>(to + col) = *reinterpret_cast<const uint4*>(from + col);
  }
}

// Where row `at` of an operand starts.
__device__ inline uint16_t* row_of(const Rows& x, bool is_packed, const Place& place, int64_t at,
                                   int head) {
  const int64_t first = is_packed ? at * x.row : place.sequence * x.batch + place.row * x.row;
  return static_cast<uint16_t*>(x.ptr) + first + head * x.head;
}

template <class T>
__device__ inline void append_row(const AppendParams& params, int64_t at, int head, int lane) {
  const int32_t* cu_seqlens = params.cu_seqlens_k_new;
  const Place place(cu_seqlens, params.seqs.b, params.sk_new, at);
  if (place.sequence < 0) return;
  const int length = params.seqs.seqused_k[place.sequence];
  const int first = params.rotary_seqlens ? params.rotary_seqlens[place.sequence] : length;
  const int position = params.rotary_cos ? max(first + place.row, 0) : -1;
  const int slot = length + place.row;
  const bool is_packed = cu_seqlens != nullptr;
  uint16_t* k = attn::cache_slot(params.k, params.seqs, place.sequence, slot, head);
  uint16_t* v = attn::cache_slot(params.v, params.seqs, place.sequence, slot, head);
  if (k == nullptr) return;
  move_row<T>(k, row_of(params.k_new, is_packed, place, at, head), params.d, position, params,
              lane);
  move_row<T>(v, row_of(params.v_new, is_packed, place, at, head), params.dv, -1, params, lane);
}

template <class T>
__device__ inline void rotate_query(const AppendParams& params, int64_t at, int head, int lane) {
  const int32_t* cu_seqlens = params.seqs.cu_seqlens_q;
  const Place place(cu_seqlens, params.seqs.b, params.seqs.sq, at);
  if (place.sequence < 0) return;
  const int32_t* firsts = params.rotary_seqlens ? params.rotary_seqlens : params.seqs.seqused_k;
  const int position = firsts[place.sequence] + (params.queries_stay ? 0 : place.row);
  const bool is_packed = cu_seqlens != nullptr;
  move_row<T>(row_of(params.q_rotated, is_packed, place, at, head),
              row_of(params.q, is_packed, place, at, head), params.d, max(position, 0), params,
              lane);
}

// Grid: rows of all sequences times hk, then times hq where queries are rotated, kAppendRows a CTA.
template <class T>
__device__ inline void append(const AppendParams& params) {
  const int lane = threadIdx.x % 32;
  const Sequences& seqs = params.seqs;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kAppendRows + threadIdx.x / 32;
  const int64_t b = seqs.b;
  const int64_t rows_k = params.cu_seqlens_k_new ? params.sk_new : b * params.sk_new;
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
