// From products K Q^T to probabilities and to gradients of scores, on accumulators of 64 keys by a
// block of queries: keys are rows here, so statistics of queries belong to columns.
#pragma once

#include "attn/scores.cuh"
#include "sm90/backward_pipeline.cuh"
#include "tile/warpgroup.cuh"

namespace flash::sm90 {

// What belongs to a lane's columns 8 n + 2 (lane % 4) and the next: lse in base 2, or -delta.
enum Statistic { kLse, kMinusDelta };
struct ColumnPairs {
  float2 at[8];

  __device__ __forceinline__ ColumnPairs(Statistic which, uint32_t smem, int lane) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      at[n] = ptx::ld_shared_v2_f32(smem + lane % 4 * 8 + which * 256 + n * 32);
    }
  }
};

// Sums of products begin with what belongs to their column, times `factor`.
__device__ __forceinline__ void begin_with(tile::Accumulators<1, 8>& acc, const ColumnPairs& x,
                                           float factor = 1.0f) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float pair[2] = {x.at[n].x * factor, x.at[n].y * factor};
#pragma unroll
    for (int i = 0; i < 4; ++i) acc.c[0][n][i] = pair[i % 2];
  }
}

__device__ __forceinline__ void add_to(tile::Accumulators<1, 8>& acc, const ColumnPairs& x) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc.c[0][n][i] += i % 2 == 0 ? x.at[n].x : x.at[n].y;
  }
}

// Queries that see a key, from the first 64 on: [begin, end).
struct Seen {
  int begin, end;

  __device__ __forceinline__ Seen(uint32_t bounds, int query) {
    const float2 x = ptx::ld_shared_v2_f32(bounds);
    begin = __float_as_int(x.x) - query;
    end = __float_as_int(x.y) - query;
  }
};

// Hides queries that do not see a key. `query`: of this lane's first entry.
__device__ __forceinline__ void hide_queries(tile::Accumulators<1, 8>& s, uint32_t bounds,
                                             int query) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Seen seen(bounds + 64 * h, query);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * n + i;
        if (at < seen.begin || at >= seen.end) s.c[0][n][2 * h + i] = -attn::infinity();
      }
    }
  }
}

// S becomes P; its sums began with lse times TmaBackwardParams::lse_factor.
__device__ __forceinline__ void exponentiate(tile::Accumulators<1, 8>& s, float scale_log2) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.c[0][n][i] = ptx::ex2(s.c[0][n][i] * scale_log2);
  }
}

// The same of S as it is.
__device__ __forceinline__ void exponentiate(tile::Accumulators<1, 8>& s, float scale_log2,
                                             const ColumnPairs& lse) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s.c[0][n][i] = ptx::ex2(s.c[0][n][i] * scale_log2 - (i % 2 == 0 ? lse.at[n].x : lse.at[n].y));
    }
  }
}

// With softcap or ALiBi: products S become P, packed in `p`, and what dP - delta is multiplied by
// in `s`. Of this lane's first entry: its query, and the distance from the key to that.
template <class T, bool kCaps>
__device__ __forceinline__ void transform(tile::Accumulators<1, 8>& s, uint32_t (&p)[4][4],
                                          const attn::ScoreRule& rule, uint32_t bounds, int query,
                                          int distance, const ColumnPairs& lse) {
  const float factor = kCaps ? __fdividef(rule.scale, rule.softcap) : rule.scale;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Seen seen(bounds + 64 * h, query);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float weight[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int col = 8 * n + i;
        float& x = s.c[0][n][2 * h + i];
        float slope = 1.0f;
        x *= factor;
        if (kCaps) {
          const float t = attn::tanh(x);
          slope = 1.0f - t * t;
          x = rule.softcap * t;
        }
        x -= rule.slope * static_cast<float>(abs(distance + col - 8 * h));
        const bool is_seen = col >= seen.begin && col < seen.end;
        x = is_seen ? ptx::ex2(x * attn::kLog2e - (i == 0 ? lse.at[n].x : lse.at[n].y)) : 0.0f;
        weight[i] = x * slope;
      }
      p[n / 2][n % 2 * 2 + h] = ptx::pack<T>(s.c[0][n][2 * h], s.c[0][n][2 * h + 1]);
      s.c[0][n][2 * h] = weight[0];
      s.c[0][n][2 * h + 1] = weight[1];
    }
  }
}

// dS = P (dP - delta), packed. `s`: P, or what else dP - delta is multiplied by; `dp`: less delta.
template <class T>
__device__ __forceinline__ void gradients_of_scores(uint32_t (&ds)[4][4],
                                                    const tile::Accumulators<1, 8>& s,
                                                    const tile::Accumulators<1, 8>& dp) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float (&p)[4] = s.c[0][n];
      const float (&x)[4] = dp.c[0][n];
      ds[n / 2][n % 2 * 2 + h] = ptx::pack<T>(p[2 * h] * x[2 * h], p[2 * h + 1] * x[2 * h + 1]);
    }
  }
}

}  // namespace flash::sm90
