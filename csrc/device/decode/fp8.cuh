// Queries over a cache of e4m3: they become f16 on the way to shared memory, whatever they are, and
// so do keys and values on the way from there (tile/fp8_products.cuh).
//
// f16 holds e4m3 exactly. bf16 has more exponents than f16: a row of it is scaled by a power of two
// that puts its largest element near 2^12. That takes bits only from elements below 2^-26 of the
// largest, and the row's scores are scaled back, together with the factors of Q and K.
#pragma once

#include "decode/queries.cuh"

namespace flash::decode {

// A power of two for a row of bf16 and its inverse, by the largest exponent of the row.
struct RowScale {
  float to_f16, back;

  __device__ explicit RowScale(uint32_t exponent) {
    constexpr uint32_t kAbove = 12;  // exponents of the scaled row's largest element over 1
    const uint32_t e = exponent < 14 ? 14 : exponent;
    to_f16 = __uint_as_float((254 + kAbove - e) << 23);
    back = __uint_as_float((e - kAbove) << 23);
  }
};

template <class Cfg>
struct Queries<Cfg, true> {
  using TileQ = typename Cfg::TileQ;
  // A thread takes 16 columns of a row, and as many lanes have a row as make a power of two.
  static constexpr int kCols = 16;
  static constexpr int kLanes = Cfg::kHeadDim > 128 ? 16 : Cfg::kHeadDim / kCols;
  static constexpr int kRowsAtOnce = Cfg::kThreads / kLanes;
  static constexpr int kMine = (TileQ::kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  uint4 x[2];    // of the first row, or the one that load() was last called for
  float scores;  // factor of Q times that of K
  float values;  // factor of V

  __device__ static int row(int thread, int index) { return thread / kLanes + index * kRowsAtOnce; }

  __device__ void load(const DecodeParams& params, const attn::Sequence& seq, int head_k,
                       int thread, int index = 0) {
    const ForwardParams& call = params.call;
    if (index == 0) {
      scores = attn::factor_of(call.q_descale, seq.index, head_k) *
               attn::factor_of(call.k_descale, seq.index, head_k);
      values = attn::factor_of(call.v_descale, seq.index, head_k);
    }
    x[0] = x[1] = make_uint4(0, 0, 0, 0);
    const int r = row(thread, index);
    const int col = thread % kLanes * kCols;
    if (r >= num_rows(params, seq) || col >= call.d) return;
    const uint16_t* from = query_row(params, seq, Row(params, head_k, r));
    if (call.q_dtype == FLASH_E4M3) {
      x[0] = *reinterpret_cast<const uint4*>(from + col / 2);
    } else {
      x[0] = *reinterpret_cast<const uint4*>(from + col);
      if (col + 8 < call.d) x[1] = *reinterpret_cast<const uint4*>(from + col + 8);
    }
  }

  // All of them, behind load(), and what each row's scores, and then O, are multiplied by.
  __device__ void store(const DecodeParams& params, const attn::Sequence& seq, int head_k,
                        uint32_t smem, float* of_rows, int thread) {
    const int lane_col = thread % kLanes * kCols;
    if (thread == 0) of_rows[TileQ::kRows] = values;
#pragma unroll 1
    for (int i = 0; i < kMine; ++i) {
      if (i > 0) load(params, seq, head_k, thread, i);
      uint32_t pairs[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
      float back = 1.0f;
      if (params.call.q_dtype == FLASH_E4M3) {
        const uint32_t fours[4] = {pairs[0], pairs[1], pairs[2], pairs[3]};
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::unpack_e4m3(pairs[2 * j], pairs[2 * j + 1], fours[j]);
      } else if (params.call.q_dtype == FLASH_BF16) {
        back = bf16_to_f16(pairs);
      }
      const int r = row(thread, i);
      if (r < TileQ::kRows && lane_col < TileQ::kCols) {
        const tile::Fp8Order order(pairs);
        ptx::st_shared_128(smem + TileQ::offset(r, lane_col / tile::kChunk), order.first);
        ptx::st_shared_128(smem + TileQ::offset(r, lane_col / tile::kChunk + 1), order.second);
        if (lane_col == 0) of_rows[r] = scores * back;
      }
    }
  }

  // Of all lanes of a row; returns what makes up for its scale.
  __device__ static float bf16_to_f16(uint32_t (&pairs)[8]) {
    uint32_t size = 0;  // of either element, in the high half: its lower bits decide nothing
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      size = max(size, max(pairs[j] & 0x7FFFFFFFu, pairs[j] << 16 & 0x7FFFFFFFu));
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      size = max(size, __shfl_xor_sync(kAllLanes, size, step));
    }
    const RowScale scale(size >> 23);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 pair = ptx::unpack<ptx::Bfloat16>(pairs[j]);
      pairs[j] = ptx::pack<ptx::Half>(pair.x * scale.to_f16, pair.y * scale.to_f16);
    }
    return scale.back;
  }

  // What scores of a lane's two rows, and then O, are multiplied by.
  struct Rescale {
    const float* of_rows;  // from the first row on; they cost registers else
    const float* values;

    __device__ Rescale(const float* of_rows, int row)
        : of_rows(of_rows + row), values(of_rows + TileQ::kRows) {}

    __device__ void scores(typename Cfg::AccS& s) const {
      const float of_row[2] = {of_rows[0], of_rows[8]};
#pragma unroll
      for (auto& quad : s.c[0]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) quad[i] *= of_row[i / 2];
      }
    }

    __device__ void results(typename Cfg::AccO& o) const {
      const float factor = *values;
#pragma unroll
      for (auto& quad : o.c[0]) {
#pragma unroll
        for (float& x : quad) x *= factor;
      }
    }
  };
};

}  // namespace flash::decode
