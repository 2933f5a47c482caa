// Online softmax whose maximum is lazy: of 16 rows, in accumulator layout.
//
// As in attn/softmax.cuh, p = 2^(scale s - shift). But the shift need not be the maximum: any shift
// gives the same result as long as nothing overflows. So scores become p at once, with the shift of
// the blocks before, and the sums of p, which softmax needs anyway, tell afterwards whether one
// grew too far. That takes the search for the maximum, a third of all instructions, out of most
// blocks.
#pragma once

#include "attn/softmax.cuh"

namespace flash::sm90 {

// From here on the sum of a lane's p of one block makes the shift rise to the maximum. Where one
// key has almost all of the weight, its p of 1 is exact, and any other is rounded for the product
// with V. So this is as small as it can be without usual scores coming near: those of 0.1 %
// outliers, ten times as large as the rest, had an error 14 to 24 % above FlashAttention-3's at
// 4096, and 7 to 12 % at 256; 64 took 2 % more time at head dim 64.
constexpr float kMostSum = 256.0f;

// Where the maxima of the four lanes of a row differ by more than this in a block, in powers of
// two, p of a later block might overflow. Those of usual scores differ by 2 or 3.
constexpr float kMostSpread = 32.0f;

struct Softmax {
  float shift[2];
  float sum[2];     // of this lane's columns only
  float factor[2];  // what O must be multiplied by, if it `is_moved`
  bool is_moved;    // the same for all lanes of a warp

  // No key has been seen.
  __device__ void clear() {
    shift[0] = shift[1] = attn::kLowestShift;
    sum[0] = sum[1] = 0.0f;
    is_moved = false;
  }

  // The ordinary way: the shift rises to the maximum, if that is far above, before scores become p.
  // Pieces of the block that are not `seen` by any row of the warp have p = 0 already.
  // True: later blocks had better not be lazy. The same for all lanes of a warp.
  template <int kN, int kPieces>
  __device__ __forceinline__ bool absorb(tile::Accumulators<1, kN>& s, float scale,
                                         const bool (&seen)[kPieces]) {
    constexpr int kGroups = kN / kPieces;
    float top[2] = {-attn::infinity(), -attn::infinity()};
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (!seen[piece]) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = fmaxf(top[h], largest<kGroups>(s, h, kGroups * piece) * scale);
      }
    }
    const bool is_spread = rise_to(top);
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (seen[piece]) exponentiate<kGroups>(s, part, scale, kGroups * piece);
    }
    add(part);
    return is_spread;
  }

  // The same of a block that all rows see to the full.
  template <int kN>
  __device__ __forceinline__ void absorb(tile::Accumulators<1, kN>& s, float scale) {
    // Shorter blocks are those of kernels that have no registers for it.
    constexpr bool kIsQuick = kN > 8;
    float top[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = (kIsQuick ? quick_largest(s, h) : largest<kN>(s, h)) * scale;
    }
    if (kIsQuick && __any_sync(0xffffffffu, top[0] < 0.0f || top[1] < 0.0f)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) top[h] = ptx::opaque(largest<kN>(s, h)) * scale;
    }
    rise_to(top);
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    exponentiate<kN>(s, part, scale, 0);
    add(part);
  }

  // To the shift of others, which is no lower.
  __device__ __forceinline__ void move_to(const float (&to)[2]) {
    is_moved = __any_sync(0xffffffffu, to[0] != shift[0] || to[1] != shift[1]);
    if (!is_moved) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) move_row_to(to[h], h);
  }

  // Scores become p, in kCount accumulators from `first` on, and their sums, by two additions at a
  // time, are added to `part`.
  template <int kCount, int kN>
  __device__ __forceinline__ void exponentiate(tile::Accumulators<1, kN>& s, float (&part)[4],
                                               float scale, int first) const {
#pragma unroll
    for (int n = first; n < first + kCount; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s.c[0][n][i] = ptx::ex2(s.c[0][n][i] * scale - shift[i / 2]);
        part[i] += s.c[0][n][i];
      }
    }
  }

  // The lazy way, behind exponentiate(). Every row must have seen a key before. False: p has
  // overflowed, and the scores are lost; nothing else has changed.
  template <int kN>
  __device__ __forceinline__ bool settle(tile::Accumulators<1, kN>& s, const float (&part)[4]) {
    float block[2] = {part[0] + part[1], part[2] + part[3]};
    is_moved = __any_sync(0xffffffffu, !(block[0] + block[1] < kMostSum));
    if (is_moved) {
      if (__any_sync(0xffffffffu, !(block[0] + block[1] < attn::infinity()))) return false;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // No more than has a reciprocal.
        const float top = fminf(fmaxf(of_row(largest<kN>(s, h)), 1.0f), 0x1p126f);
        factor[h] = ptx::rcp(top);
        shift[h] += ptx::lg2(top);
        sum[h] *= factor[h];
        block[h] *= factor[h];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          s.c[0][n][2 * h] *= factor[h];
          s.c[0][n][2 * h + 1] *= factor[h];
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] += block[h];
    return true;
  }

  template <int kN>
  __device__ __forceinline__ void scale_rows(tile::Accumulators<1, kN>& o) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o.c[0][n][i] *= factor[i / 2];
    }
  }

  // The sum of a whole row, from the four lanes that share it.
  __device__ float row_sum(int h) const {
    const float part = sum[h] + __shfl_xor_sync(0xffffffffu, sum[h], 1);
    return part + __shfl_xor_sync(0xffffffffu, part, 2);
  }

 protected:
  // `top`: the largest of this lane's scores. True: the four lanes of a row differ by far.
  __device__ __forceinline__ bool rise_to(const float (&top)[2]) {
    is_moved = __any_sync(0xffffffffu,
                          top[0] - shift[0] > attn::kSlack || top[1] - shift[1] > attn::kSlack);
    if (!is_moved) return false;
    bool is_spread = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top_of_row = of_row(top[h]);
      const float spread = top_of_row - top[h];  // infinite where all of the lane's are hidden
      is_spread = is_spread || (spread > kMostSpread && spread < attn::infinity());
      move_row_to(fmaxf(shift[h], top_of_row), h);
    }
    return __any_sync(0xffffffffu, is_spread);
  }

  // Sums of p of a block.
  __device__ __forceinline__ void add(const float (&part)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] += part[2 * h] + part[2 * h + 1];
  }

  __device__ __forceinline__ void move_row_to(float to, int h) {
    factor[h] = ptx::ex2(shift[h] - to);
    shift[h] = to;
    sum[h] *= factor[h];
  }

  // Of this lane's columns, kCount accumulators from `first` on.
  template <int kCount, int kN>
  __device__ static __forceinline__ float largest(const tile::Accumulators<1, kN>& s, int h,
                                                  int first = 0) {
    float x = s.c[0][first][2 * h];
    float y = s.c[0][first][2 * h + 1];
#pragma unroll
    for (int n = 1; n < kCount; ++n) {
      x = fmaxf(x, s.c[0][first + n][2 * h]);
      y = fmaxf(y, s.c[0][first + n][2 * h + 1]);
    }
    return fmaxf(x, y);
  }

  // Of this lane's columns, if it is not negative, else some other negative one: an instruction
  // compares three integers, and floats are in the order of their bits from zero on.
  template <int kN>
  __device__ static __forceinline__ float quick_largest(const tile::Accumulators<1, kN>& s, int h) {
    int x = __float_as_int(s.c[0][0][2 * h]);
    int y = __float_as_int(s.c[0][0][2 * h + 1]);
#pragma unroll
    for (int n = 1; n < kN; n += 2) {
      const int next = min(n + 1, kN - 1);
      x = max(max(x, __float_as_int(s.c[0][n][2 * h])), __float_as_int(s.c[0][next][2 * h]));
      y = max(max(y, __float_as_int(s.c[0][n][2 * h + 1])),
              __float_as_int(s.c[0][next][2 * h + 1]));
    }
    return __int_as_float(max(x, y));
  }

  // The largest of the four lanes that share a row.
  __device__ static float of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
};

}  // namespace flash::sm90
