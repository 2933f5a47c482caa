// From products K Q^T to probabilities and to gradients of scores, on accumulators of 64 keys by a
// block of queries: keys are rows here, so statistics of queries belong to columns.
#pragma once

#include "attn/scores.cuh"
#include "tile/warpgroup.cuh"
#include "sm90/backward_pipeline.cuh"

namespace flash::sm90 {

// Where a lane finds lse (`kind` 0) or delta (1) of its columns 8 n + 2 (lane % 4) and the next.
__device__ __forceinline__ float2 statistic(uint32_t smem, int kind, int n, int lane) {
  return ptx::ld_shared_v2_f32(smem + lane % 4 * 8 + n / 8 * 512 + kind * 256 + n % 8 * 32);
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
template <int kN>
__device__ __forceinline__ void hide_queries(tile::Accumulators<1, kN>& s, uint32_t bounds,
                                             int query) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Seen seen(bounds + 64 * h, query);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * n + i;
        if (at < seen.begin || at >= seen.end) s.c[0][n][2 * h + i] = -attn::infinity();
      }
    }
  }
}

// S becomes P.
template <int kN>
__device__ __forceinline__ void exponentiate(tile::Accumulators<1, kN>& s, float scale_log2,
                                             uint32_t statistics, int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 lse = statistic(statistics, 0, n, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s.c[0][n][i] = ptx::ex2(s.c[0][n][i] * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
    }
  }
}

// With softcap or ALiBi: products S become P, packed in `p`, and what dP - delta is multiplied by in
// `s`. Of this lane's first entry: its query, and the distance from the key to that.
template <class T, bool kCaps, int kN>
__device__ __forceinline__ void transform(tile::Accumulators<1, kN>& s, uint32_t (&p)[kN / 2][4],
                                          const attn::ScoreRule& rule, uint32_t bounds,
                                          int query, int distance, uint32_t statistics, int lane) {
  const float factor = kCaps ? __fdividef(rule.scale, rule.softcap) : rule.scale;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Seen seen(bounds + 64 * h, query);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 lse = statistic(statistics, 0, n, lane);
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
        x = is_seen ? ptx::ex2(x * attn::kLog2e - (i == 0 ? lse.x : lse.y)) : 0.0f;
        weight[i] = x * slope;
      }
      p[n / 2][n % 2 * 2 + h] = ptx::pack<T>(s.c[0][n][2 * h], s.c[0][n][2 * h + 1]);
      s.c[0][n][2 * h] = weight[0];
      s.c[0][n][2 * h + 1] = weight[1];
    }
  }
}

// Scores go to softmax as they are: no softcap, no ALiBi, a positive scale.
__device__ inline bool is_plain(const Scores& scores) {
  return scores.softcap == 0.0f && !scores.alibi_slopes && scores.softmax_scale > 0.0f;
}

// dS = P (dP - delta), packed; `s` as absorb_scores() left it.
template <class T, int kN>
__device__ __forceinline__ void gradients_of_scores(uint32_t (&ds)[kN / 2][4],
                                                    const tile::Accumulators<1, kN>& s,
                                                    const tile::Accumulators<1, kN>& dp,
                                                    uint32_t statistics, int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 delta = statistic(statistics, 1, n, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float(&p)[4] = s.c[0][n];
      const float(&x)[4] = dp.c[0][n];
      ds[n / 2][n % 2 * 2 + h] = ptx::pack<T>(p[2 * h] * (x[2 * h] - delta.x),
                                              p[2 * h + 1] * (x[2 * h + 1] - delta.y));
    }
  }
}

}  // namespace flash::sm90
