// New rows of a cache, and queries: where they come from, and how they are rotated.
#pragma once

#include "attn/sequence.cuh"
#include "ptx/math.cuh"

namespace flash::attn {

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

  __device__ uint4 rounded() const {
    return make_uint4(ptx::pack<T>(x[0], x[1]), ptx::pack<T>(x[2], x[3]), ptx::pack<T>(x[4], x[5]),
                      ptx::pack<T>(x[6], x[7]));
  }
};

// (first, second) turned by the angle of a cosine and a sine. Roundings are spelled out, so that
// every kernel gives the same bits.
__device__ inline void turn(float& first, float& second, float cos, float sin) {
  const float turned = fmaf(first, cos, -(second * sin));
  second = fmaf(first, sin, second * cos);
  first = turned;
}

// Columns [first, width) of a row, by a warp, as they are.
template <class Put>
__device__ inline void move_columns(const Put& put, const uint16_t* from, int first, int width,
                                    int lane) {
  for (int col = first + 8 * lane; col < width; col += 8 * 32) {
    put(col, *reinterpret_cast<const uint4*>(from + col));
  }
}

// One row of a head, by a warp: put(col, eight elements) gets it, its first rotary_dim elements
// rotated by row `position` of the tables; `position` below zero: as it is.
template <class T, class Put>
__device__ inline void move_row(const Put& put, const uint16_t* from, int width, int position,
                                const NewRows& rules, int lane) {
  const int rotary_dim = position < 0 ? 0 : rules.rotary_dim;
  const int half = rotary_dim / 2;
  const int64_t angles = static_cast<int64_t>(min(position, rules.rotary_rows - 1)) * half;
  const uint16_t* cos = static_cast<const uint16_t*>(rules.rotary_cos) + angles;
  const uint16_t* sin = static_cast<const uint16_t*>(rules.rotary_sin) + angles;
  for (int angle = 8 * lane; angle < half; angle += 8 * 32) {
    // Angles [angle, + 8) turn pairs of neighbours, or of elements half the rotary dim apart.
    const int left = rules.rotary_interleaved ? 2 * angle : angle;
    const int right = rules.rotary_interleaved ? left + 8 : left + half;
    const Chunk<T> c(cos + angle);
    const Chunk<T> s(sin + angle);
    Chunk<T> a(from + left);
    Chunk<T> b(from + right);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!rules.rotary_interleaved) {
        turn(a.x[i], b.x[i], c.x[i], s.x[i]);
      } else if (i < 4) {
        turn(a.x[2 * i], a.x[2 * i + 1], c.x[i], s.x[i]);
      } else {
        turn(b.x[2 * i - 8], b.x[2 * i - 7], c.x[i], s.x[i]);
      }
    }
    put(left, a.rounded());
    put(right, b.rounded());
  }
  move_columns(put, from, rotary_dim, width, lane);
}

// Rotary position of new row `row` of a sequence, -1 where nothing is rotated.
__device__ inline int position_of_key(const NewRows& added, const Sequences& all, int sequence,
                                      int row) {
  if (!added.rotary_cos) return -1;
  const int32_t* firsts = added.rotary_seqlens ? added.rotary_seqlens : all.seqused_k;
  return max(firsts[sequence] + row, 0);
}

// The same of a query.
__device__ inline int position_of_query(const NewRows& added, const Sequences& all, int sequence,
                                        int row) {
  return position_of_key(added, all, sequence, added.queries_stay ? 0 : row);
}

// Where row `row` of a sequence starts, of an operand packed by `cu_seqlens` or dense.
__device__ inline uint16_t* row_of(const Rows& x, const int32_t* cu_seqlens, int sequence, int row,
                                   int head) {
  const int64_t first = cu_seqlens ? (static_cast<int64_t>(cu_seqlens[sequence]) + row) * x.row
                                   : sequence * x.batch + row * x.row;
  return static_cast<uint16_t*>(x.ptr) + first + head * x.head;
}

}  // namespace flash::attn
