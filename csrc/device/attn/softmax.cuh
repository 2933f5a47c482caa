// Online softmax over accumulator rows: running maximum, running sum, rescaling of O.
//
// Everything is in base 2: p = 2^(scale (s - max)), one FFMA and one ex2 an entry. `scale` is
// softmax_scale * log2(e) where the scores are raw products, log2(e) where they were transformed.
#pragma once

#include "tile/gemm.cuh"

namespace flash::attn {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// Row statistics of kM x 16 rows: rows l / 4 and l / 4 + 8 of each 16.
template <int kM>
struct Softmax {
  float row_max[kM][2];
  float row_sum[kM][2];  // of this lane's columns only, until finish()

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_max[m][h] = -infinity();
        row_sum[m][h] = 0.0f;
      }
    }
  }

  // s becomes p = 2^(scale (s - row_max)). O follows a new maximum only when some row of the warp
  // grew by more than 2^kSlack: until then p and the sums may exceed 1 by that factor, which costs no
  // accuracy in floating point and saves the multiplications of O.
  template <int kS, int kO>
  __device__ void step(tile::Accumulators<kM, kS>& s, tile::Accumulators<kM, kO>& o, float scale) {
    constexpr float kSlack = 6.0f;
    float top[kM][2];
    bool grows = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[m][h] = s.c[m][0][2 * h];
#pragma unroll
        for (int n = 0; n < kS; ++n) {
          top[m][h] = fmaxf(top[m][h], fmaxf(s.c[m][n][2 * h], s.c[m][n][2 * h + 1]));
        }
        top[m][h] = fmaxf(top[m][h], __shfl_xor_sync(0xffffffffu, top[m][h], 1));
        top[m][h] = fmaxf(top[m][h], __shfl_xor_sync(0xffffffffu, top[m][h], 2));
        // Negated, so that a NaN (maximum still -inf, or NaN scores) counts as growth.
        grows |= !((top[m][h] - row_max[m][h]) * scale <= kSlack);
      }
    }
    if (__any_sync(0xffffffffu, grows)) rescale(o, top, scale);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shift = shift_of(row_max[m][h], scale);
        float sum = row_sum[m][h];
#pragma unroll
        for (int n = 0; n < kS; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s.c[m][n][i] = ptx::ex2(s.c[m][n][i] * scale - shift);
            sum += s.c[m][n][i];
          }
        }
        row_sum[m][h] = sum;
      }
    }
  }

  // What is taken off scaled scores. A row that has seen no key yet has maximum -inf; 0 keeps
  // 2^(-inf - shift) at 0.
  __device__ static float shift_of(float maximum, float scale) {
    return maximum == -infinity() ? 0.0f : maximum * scale;
  }

  // Moves O and the sums to the larger of the present maximum and `top`.
  template <int kO>
  __device__ void rescale(tile::Accumulators<kM, kO>& o, const float (&top)[kM][2], float scale) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float maximum = fmaxf(row_max[m][h], top[m][h]);
        const float correction = ptx::ex2(row_max[m][h] * scale - shift_of(maximum, scale));
        row_max[m][h] = maximum;
        row_sum[m][h] *= correction;
#pragma unroll
        for (int n = 0; n < kO; ++n) {
          o.c[m][n][2 * h] *= correction;
          o.c[m][n][2 * h + 1] *= correction;
        }
      }
    }
  }

  // Normalises O; the natural log-sum-exp replaces row_max. A row without keys gets O 0.
  template <int kO>
  __device__ void finish(tile::Accumulators<kM, kO>& o, float scale, float keep_scale,
                         float empty_lse) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = row_sum[m][h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const bool is_empty = sum == 0.0f;
        const float factor = is_empty ? 0.0f : keep_scale / sum;
        row_max[m][h] = is_empty ? empty_lse : (row_max[m][h] * scale + ptx::lg2(sum)) * kLn2;
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
