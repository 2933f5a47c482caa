// From products q k^T to scores: scale, softcap, ALiBi, mask, on accumulators of a warp tile.
#pragma once

#include "attn/mask.cuh"
#include "attn/softmax.cuh"

namespace flash::attn {

// What one head does to its products before softmax.
struct ScoreRule {
  float scale;    // factor inside softcap, or of plain products
  float softcap;  // 0: none
  float slope;    // 0: none
  bool is_plain;  // products go to softmax as they are: no softcap, no ALiBi, a positive scale
  float softmax_scale_log2;

  __device__ ScoreRule(const Scores& scores, int sequence, int head)
      : scale(scores.softmax_scale), softcap(scores.softcap), slope(0.0f) {
    if (scores.alibi_slopes) {
      slope = scores.alibi_slopes[sequence * scores.alibi_batch_stride + head];
    }
    // Online softmax takes the maximum before it scales, so a scale below zero is applied early.
    is_plain = softcap == 0.0f && slope == 0.0f && scale > 0.0f;
    softmax_scale_log2 = is_plain ? scale * kLog2e : kLog2e;
  }
};

// The same of all heads of a call.
__device__ inline bool is_plain(const Scores& scores) {
  return scores.softcap == 0.0f && !scores.alibi_slopes && scores.softmax_scale > 0.0f;
}

// tanh(x) = 1 - 2 / (e^2x + 1), to float precision; tanh.approx has 11 bits.
__device__ inline float tanh(float x) {
  return 1.0f - __fdividef(2.0f, ptx::ex2(2.0f * kLog2e * x) + 1.0f);
}

// Applies softcap and ALiBi to a tile whose first entry of this lane is (row, col).
template <int kM, int kN>
__device__ inline void transform(tile::Accumulators<kM, kN>& s, const ScoreRule& rule,
                                 const Mask& mask, int row, int col) {
  const float inverse_cap = 1.0f / rule.softcap;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = s.c[m][n][i] * rule.scale;
        if (rule.softcap > 0.0f) x = rule.softcap * tanh(x * inverse_cap);
        const int distance = row + 16 * m + 8 * (i / 2) + mask.diagonal - (col + 8 * n + i % 2);
        s.c[m][n][i] = x - rule.slope * abs(distance);
      }
    }
  }
}

// The same for the backward pass: gradients of scores in `ds` become gradients of scaled products.
template <int kM, int kN>
__device__ inline void transform(tile::Accumulators<kM, kN>& s, tile::Accumulators<kM, kN>& ds,
                                 const ScoreRule& rule, const Mask& mask, int row, int col) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s.c[m][n][i] *= rule.scale;
    }
  }
  if (rule.softcap > 0.0f) {
    // Opaque: taken out of the loop over blocks, the quotient would keep a register.
    const float inverse_cap = 1.0f / ptx::opaque(rule.softcap);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float t = tanh(s.c[m][n][i] * inverse_cap);
          s.c[m][n][i] = rule.softcap * t;
          ds.c[m][n][i] *= 1.0f - t * t;
        }
      }
    }
  }
  if (rule.slope != 0.0f) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int distance = row + 16 * m + 8 * (i / 2) + mask.diagonal - (col + 8 * n + i % 2);
          s.c[m][n][i] -= rule.slope * abs(distance);
        }
      }
    }
  }
}

// Sets entries from the end of what their row sees on to -inf.
template <int kM, int kN>
__device__ inline void hide_right(tile::Accumulators<kM, kN>& s, const Mask& mask, int row,
                                  int col) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int end = mask.highest(ptx::opaque(row) + 16 * m + 8 * h) - col;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (8 * n >= end) s.c[m][n][2 * h] = -infinity();
        if (8 * n + 1 >= end) s.c[m][n][2 * h + 1] = -infinity();
      }
    }
  }
}

// Sets entries in front of what their row sees to -inf.
template <int kM, int kN>
__device__ inline void hide_left(tile::Accumulators<kM, kN>& s, const Mask& mask, int row,
                                 int col) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int begin = mask.lowest(ptx::opaque(row) + 16 * m + 8 * h) - col;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (8 * n < begin) s.c[m][n][2 * h] = -infinity();
        if (8 * n + 1 < begin) s.c[m][n][2 * h + 1] = -infinity();
      }
    }
  }
}

// Sets entries that are not visible to -inf.
template <int kM, int kN>
__device__ inline void hide(tile::Accumulators<kM, kN>& s, const Mask& mask, int row, int col) {
  hide_right(s, mask, row, col);
  hide_left(s, mask, row, col);
}

}  // namespace flash::attn
