// Online softmax of 16 rows whose p is rounded to e4m3, in accumulator layout.
//
// The shift is always the maximum: the largest p becomes 2^8 exactly, since it has most of the
// weight, and 14 powers of two below it keep all their bits. A lazy maximum would let the largest p
// be rounded like any other, which makes the error of O larger by 8 % for normal scores, and by far
// more where few keys have all the weight.
#pragma once

#include "sm90/softmax.cuh"

namespace flash::sm90 {

struct Fp8Softmax : Softmax {
  static constexpr float kHead = 8.0f;

  // Moves the shift up to the maximum.
  template <int kN>
  __device__ __forceinline__ void move(const tile::Accumulators<1, kN>& s, float scale) {
    float top[2] = {quick_largest(s, 0) * scale, quick_largest(s, 1) * scale};
    is_moved = any(top[0] - shift[0] > kHead || top[1] - shift[1] > kHead || top[0] < 0.0f ||
                   top[1] < 0.0f);
    if (is_moved) {
      if (any(top[0] < 0.0f || top[1] < 0.0f)) {
#pragma unroll
        for (int h = 0; h < 2; ++h) top[h] = ptx::opaque(largest<kN>(s, h)) * scale;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        move_row_to(fmaxf(shift[h], of_row(top[h]) - kHead), h);
      }
    }
  }

  // Scores become p, packed as A operands of the product with V; p of keys that have no scores is
  // zero. A lane's four values of a step are not neighbours: within 16 columns the operand's order
  // is 0 1 8 9, 2 3 10 11, ... So is that of V (fp8_transpose.cuh).
  template <int kN, int kSteps>
  __device__ __forceinline__ void absorb(tile::Accumulators<1, kN>& s, uint32_t (&p)[kSteps][4],
                                         float scale) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kN / 4; ++k) {
#pragma unroll
      for (int n = 4 * k; n < 4 * k + 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s.c[0][n][i] = ptx::ex2(s.c[0][n][i] * scale - shift[i / 2]);
          part[i] += s.c[0][n][i];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&low)[4] = s.c[0][4 * k + i / 2 * 2];
        const float (&high)[4] = s.c[0][4 * k + i / 2 * 2 + 1];
        const int row = i % 2 * 2;
        p[k][i] = ptx::pack_e4m3(low[row], low[row + 1], high[row], high[row + 1]);
      }
    }
#pragma unroll
    for (int k = kN / 4; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[k][i] = 0;
    }
    add(part);
  }

  // Where a shift has moved, it mostly has in one half of a warp's rows alone. To ask pays where O
  // is wide.
  template <int kN>
  __device__ __forceinline__ void scale_rows(tile::Accumulators<1, kN>& o) const {
    constexpr bool kAsks = kN >= 24;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (kAsks && !any(factor[h] < 1.0f)) continue;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        o.c[0][n][2 * h] *= factor[h];
        o.c[0][n][2 * h + 1] *= factor[h];
      }
    }
  }

 private:
  __device__ static bool any(bool x) { return __any_sync(0xffffffffu, x); }
};

template <bool kIsFp8>
struct SoftmaxOf {
  using Type = Softmax;
};
template <>
struct SoftmaxOf<true> {
  using Type = Fp8Softmax;
};

}  // namespace flash::sm90
