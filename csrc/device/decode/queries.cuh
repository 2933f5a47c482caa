// Q of one pair on its way to shared memory.
#pragma once

#include "attn/new_rows.cuh"
#include "decode/merge.cuh"
#include "tile/fp8_products.cuh"

namespace flash::decode {

__device__ inline const uint16_t* query_row(const DecodeParams& params, const attn::Sequence& seq,
                                            const Row& row) {
  const ForwardParams& call = params.call;
  return attn::rows_of_q(call.q, call.seqs, seq, row.head) + row.position * call.q.row;
}

// Rows and columns that are not there become zeros.
template <class Cfg, bool is_fp8 = Cfg::kIsFp8>
struct Queries {
  using TileQ = typename Cfg::TileQ;
  static constexpr int kChunks = TileQ::kCols / tile::kChunk;
  static constexpr int kAll = TileQ::kRows * kChunks;
  static constexpr int kMine = (kAll + Cfg::kThreads - 1) / Cfg::kThreads;  // chunks of a thread
  static constexpr int kAtOnce = Cfg::kHeadDim > 128 ? 2 : kMine < 4 ? kMine : 4;
  uint4 x[kAtOnce];

  // The first ones, or those from `first` on.
  __device__ void load(const DecodeParams& params, const attn::Sequence& seq, int head_k,
                       int thread, int first = 0) {
    const int rows = num_rows(params, seq);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = thread + (first + i) * Cfg::kThreads;
      const int r = at / kChunks;
      const int col = at % kChunks * tile::kChunk;
      x[i] = make_uint4(0, 0, 0, 0);
      if (r < rows && col < params.call.d) {
        const uint16_t* from = query_row(params, seq, Row(params, head_k, r));
        x[i] = *reinterpret_cast<const uint4*>(from + col);
      }
    }
  }

  // All of them, behind load().
  __device__ void store(const DecodeParams& params, const attn::Sequence& seq, int head_k,
                        uint32_t smem, float*, int thread) {
#pragma unroll 1
    for (int first = 0; first < kMine; first += kAtOnce) {
      if (first > 0) load(params, seq, head_k, thread, first);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = thread + (first + i) * Cfg::kThreads;
        if (at < kAll) ptx::st_shared_128(smem + TileQ::offset(at / kChunks, at % kChunks), x[i]);
      }
    }
    if (!params.added.rotary_cos) return;
    __syncthreads();
    for (int r = thread / 32; r < num_rows(params, seq); r += Cfg::kWarps) {
      const Row it(params, head_k, r);
      const auto put = [&](int col, uint4 x) {
        ptx::st_shared_128(smem + TileQ::offset(r, col / tile::kChunk), x);
      };
      const int position =
          attn::position_of_query(params.added, params.call.seqs, seq.index, it.position);
      attn::move_row<typename Cfg::T>(put, query_row(params, seq, it), params.call.d, position,
                                      params.added, thread % 32);
    }
  }

  // What their scores, and then O, are multiplied by: nothing.
  struct Rescale {
    __device__ Rescale(const float*, int) {}
    __device__ void scores(typename Cfg::AccS&) const {}
    __device__ void results(typename Cfg::AccO&) const {}
  };
};

}  // namespace flash::decode
