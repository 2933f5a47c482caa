// Online softmax over accumulator rows: running shift, running sum, rescaling of O.
//
// Everything is in base 2: p = 2^(scale s - shift), one FFMA and one ex2 an entry. `scale` is
// softmax_scale * log2(e) where the scores are raw products, log2(e) where they were transformed.
// The shift of a row is the largest scaled score that it had when it was last moved.
#pragma once

#include "tile/accumulators.cuh"

namespace flash::attn {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The shift of a row that has seen no key: below all scores, and finite, so that hidden scores of
// -inf get p = 0.
constexpr float kLowestShift = -3.0e38f;
// The shift follows the maximum where an entry would exceed 2^kSlack: up to there p and the sums
// lose no accuracy, floating point as they are, and the multiplications of O are saved.
constexpr float kSlack = 6.0f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// Row statistics of kM x 16 rows: rows l / 4 and l / 4 + 8 of each 16.
template <int kM>
struct Softmax {
  float shift[kM][2];
  float sum[kM][2];  // of this lane's columns only, until finish()

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shift[m][h] = kLowestShift;
        sum[m][h] = 0.0f;
      }
    }
  }

  // Moves shift, sums and O where the scores of a block demand it.
  template <int kS, int kO>
  __device__ void follow(tile::Accumulators<kM, kO>& o, const tile::Accumulators<kM, kS>& s,
                         float scale) {
    float top[kM][2];
    bool grows = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = fmaxf(s.c[m][0][2 * h], s.c[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kS; ++n) {
          x = fmaxf(x, fmaxf(s.c[m][n][2 * h], s.c[m][n][2 * h + 1]));
        }
        top[m][h] = x * scale;
        grows |= top[m][h] - shift[m][h] > kSlack;
      }
    }
    if (__any_sync(0xffffffffu, grows)) move(o, top);
  }

  // Moves shifts up to `top`, of which each of the four lanes of a row has a part.
  template <int kO>
  __device__ void move(tile::Accumulators<kM, kO>& o, const float (&top)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float to = fmaxf(shift[m][h], top[m][h]);
        to = fmaxf(to, __shfl_xor_sync(0xffffffffu, to, 1));
        to = fmaxf(to, __shfl_xor_sync(0xffffffffu, to, 2));
        const float correction = ptx::ex2(shift[m][h] - to);
        shift[m][h] = to;
        sum[m][h] *= correction;
#pragma unroll
        for (int n = 0; n < kO; ++n) {
          o.c[m][n][2 * h] *= correction;
          o.c[m][n][2 * h + 1] *= correction;
        }
      }
    }
  }

  // Scores become p, and join the sums.
  template <int kS>
  __device__ void exponentiate(tile::Accumulators<kM, kS>& s, float scale) {
#pragma unroll
    for (int n = 0; n < kS; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s.c[m][n][i] = ptx::ex2(s.c[m][n][i] * scale - shift[m][i / 2]);
          sum[m][i / 2] += s.c[m][n][i];
        }
      }
    }
  }

  // Takes a score out of the product with V; the sum of its row keeps it.
  __device__ void drop(float& s, int m, int h, float scale) {
    sum[m][h] += ptx::ex2(s * scale - shift[m][h]);
    s = -infinity();
  }

  // Normalises O; the natural log-sum-exp replaces the shift. A row without keys gets O 0.
  template <int kO>
  __device__ void finish(tile::Accumulators<kM, kO>& o, float keep_scale, float empty_lse) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 1);
        sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 2);
        const bool is_empty = sum[m][h] == 0.0f;
        const float factor = is_empty ? 0.0f : __fdividef(keep_scale, sum[m][h]);
        shift[m][h] = is_empty ? empty_lse : (shift[m][h] + ptx::lg2(sum[m][h])) * kLn2;
#pragma unroll
        for (int n = 0; n < kO; ++n) {
          o.c[m][n][2 * h] *= factor;
          o.c[m][n][2 * h + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace flash::attn
