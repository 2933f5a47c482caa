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

// Of a lane's row in 128 columns, a bit for each entry, in the order of the accumulators: whether
// its column, counted from the lane's first, is below `end`.
__device__ inline uint32_t entries_below(int end) {
  end = min(max(end, 0), 128);
  return ~(0xffffffffu << (end + 7) / 8 << (end + 6) / 8);
}

// Sets entries that are not visible to -inf. Bits become predicates seven at a time, which takes a
// third of the instructions of two comparisons for each entry.
template <int kM, int kN>
__device__ inline void hide(tile::Accumulators<kM, kN>& s, const Mask& mask, int row, int col) {
  constexpr int kStep = 16;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = ptx::opaque(row) + 16 * m + 8 * h;
      const int begin = mask.lowest(i) - col;
      const int end = mask.highest(i) - col;
#pragma unroll
      for (int first = 0; first < kN; first += kStep) {
        const uint32_t seen = entries_below(end - 8 * first) & ~entries_below(begin - 8 * first);
#pragma unroll
        for (int bit = 0; bit < 2 * min(kStep, kN - first); ++bit) {
          float& x = s.c[m][first + bit / 2][2 * h + bit % 2];
          if (!(seen & 1u << bit)) x = -infinity();
        }
      }
    }
  }
}

// The same by comparisons, which take more instructions and fewer registers.
template <int kM, int kN>
__device__ inline void hide_by_comparisons(tile::Accumulators<kM, kN>& s, const Mask& mask, int row,
                                           int col) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int end = mask.highest(ptx::opaque(row) + 16 * m + 8 * h) - col;
      const int begin = mask.lowest(ptx::opaque(row) + 16 * m + 8 * h) - col;
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) {
        const int at = 8 * (i / 2) + i % 2;
        if (at >= end || at < begin) s.c[m][i / 2][2 * h + i % 2] = -infinity();
      }
    }
  }
}

}  // namespace flash::attn
