// What softcap and ALiBi make of scores.
#pragma once

#include "attn/scores.cuh"

namespace flash::sm90 {

// Softcap and ALiBi, as attn::transform() has them. That one divides by a call of a function, which
// must not be while products of the warpgroup are under way. `distance`: from the key of this
// lane's first entry to its query.
template <int kN>
__device__ __forceinline__ void transform(tile::Accumulators<1, kN>& s, const attn::ScoreRule& rule,
                                          int distance) {
  const float factor = rule.softcap > 0.0f ? __fdividef(rule.scale, rule.softcap) : rule.scale;
  const auto each = [&](const auto& change) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) change(s.c[0][n][i], 8 * n + i % 2, i / 2);
    }
  };
  each([&](float& x, int, int) { x *= factor; });
  if (rule.softcap > 0.0f) {
    each([&](float& x, int, int) { x = rule.softcap * attn::tanh(x); });
  }
  if (rule.slope != 0.0f) {
    each([&](float& x, int col, int h) { x -= rule.slope * abs(distance + 8 * h - col); });
  }
}

}  // namespace flash::sm90
