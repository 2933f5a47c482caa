// Forward attention for cc >= 8.0: O = softmax(scores(Q K^T)) V and its log-sum-exp.
//
// One CTA computes block_m rows of one head, warp w its rows [w R, w R + R), R = 16 or 32. Blocks of
// keys run from the last to the first, so that boundary blocks come first:
//
//   load Q, K(last)
//   for block j, descending:
//     load V(j)      ------------------.       one buffer each for K and V: while a product reads
//     wait K; S = Q K^T                |       one, the other is filled by cp.async
//     load K(j - 1)  -----------------.|
//     transform, hide, softmax: S -> P, O rescaled
//     wait V; O += P V   (P stays in registers: an accumulator pair is an A operand)
//   O / sum -> Q's buffer -> 16-byte stores
//
// Shared memory: (block_m + 2 block_n) * head_dim * 2 bytes (config.h). Bound by the tensor cores from
// head dim 128 on, by issue slots at 64. Sources: FlashAttention-2 (arXiv:2307.08691).
#pragma once

#include "attn/dropout.cuh"
#include "attn/schedule.cuh"
#include "attn/scores.cuh"
#include "attn/sequence.cuh"
#include "attn/softmax.cuh"
#include "sm80/config.h"
#include "tile/gemm.cuh"

namespace flash::sm80 {

template <class T_, int kHeadDim_>
struct ForwardConfig {
  using T = T_;
  static constexpr ForwardTile kTile = forward_tile(kHeadDim_);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kRowTiles = kTile.rows_per_warp() / 16;  // m16 tiles of a warp
  using TileQ = tile::SmemTile<kBlockM, kHeadDim>;
  using TileK = tile::SmemTile<kBlockN, kHeadDim>;
  using AccS = tile::Accumulators<kRowTiles, kBlockN / 8>;
  using AccO = tile::Accumulators<kRowTiles, kHeadDim / 8>;
};

// Loads keys [first, first + kBlockN) of K or V.
template <class Cfg>
__device__ inline void load_keys(uint32_t smem, const attn::KeyRows& x, int first, int sk,
                                 int num_cols, int thread) {
  using Tile = typename Cfg::TileK;
  if (x.table) {
    const auto source = [&](int r) { return x.paged_row(first + r, sk); };
    tile::load_async<Tile, Cfg::kThreads>(smem, source, sk - first, num_cols, thread);
  } else {
    const uint16_t* base = x.base + first * x.row_stride;
    const auto source = [&](int r) { return base + r * x.row_stride; };
    tile::load_async<Tile, Cfg::kThreads>(smem, source, sk - first, num_cols, thread);
  }
}

// Zeroes the entries that dropout drops; the sum of the row keeps them.
template <class Cfg>
__device__ inline void drop(typename Cfg::AccS& p, const attn::Dropout& dropout, int warp_row,
                            int block_col, int lane) {
#pragma unroll
  for (int m = 0; m < Cfg::kRowTiles; ++m) {
#pragma unroll
    for (int g = 0; g < Cfg::kBlockN / 32; ++g) {
      uint32_t words[4];
      dropout.bytes(words, warp_row + 16 * m, block_col + 32 * g, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!dropout.keeps(words, i / 2, n, i % 2)) p.c[m][4 * g + n][i] = 0.0f;
        }
      }
    }
  }
}

// Rounds O into Q's buffer and stores it with 16 bytes a thread.
template <class Cfg>
__device__ inline void store_o(const typename Cfg::AccO& o, uint32_t smem, uint16_t* to,
                               int64_t row_stride, int num_rows, int num_cols, int warp_row,
                               int thread) {
  using Tile = typename Cfg::TileQ;
  const int lane = thread % 32;
#pragma unroll
  for (int m = 0; m < Cfg::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Cfg::kHeadDim / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * m + lane / 4 + 8 * h;
        ptx::st_shared_32(smem + Tile::offset(row, n) + lane % 4 * 4,
                          ptx::pack<typename Cfg::T>(o.c[m][n][2 * h], o.c[m][n][2 * h + 1]));
      }
    }
  }
  __syncthreads();
  constexpr int kChunks = Cfg::kHeadDim / tile::kChunk;
  for (int at = thread; at < Cfg::kBlockM * kChunks; at += Cfg::kThreads) {
    const int row = at / kChunks;
    const int chunk = at % kChunks;
    if (row < num_rows && chunk * tile::kChunk < num_cols) {
      *reinterpret_cast<uint4*>(to + row * row_stride + chunk * tile::kChunk) =
          ptx::ld_shared_128(smem + Tile::offset(row, chunk));
    }
  }
}

// Stores O unrounded: the part of a split call.
template <class Cfg>
__device__ inline void store_part(const typename Cfg::AccO& o, float* to, int num_rows, int num_cols,
                                  int warp_row, int lane) {
#pragma unroll
  for (int m = 0; m < Cfg::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Cfg::kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + 16 * m + lane / 4 + i / 2 * 8;
        const int col = 8 * n + lane % 4 * 2 + i % 2;
        if (row < num_rows && col < num_cols) {
          to[static_cast<int64_t>(row) * num_cols + col] = o.c[m][n][i];
        }
      }
    }
  }
}

template <class Cfg>
__device__ inline void forward(const ForwardParams& params) {
  using T = typename Cfg::T;
  extern __shared__ __align__(128) unsigned char smem[];
  const uint32_t q_smem = ptx::smem_address(smem);
  const uint32_t k_smem = q_smem + Cfg::TileQ::kBytes;
  const uint32_t v_smem = k_smem + Cfg::TileK::kBytes;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp_row = thread / 32 * (16 * Cfg::kRowTiles);

  const int num_blocks = (params.seqs.sq + Cfg::kBlockM - 1) / Cfg::kBlockM;
  const attn::TileIndex at(blockIdx.x, num_blocks, params.hq, params.seqs.b, params.num_splits,
                           params.heads_per_section);
  const attn::Sequence seq(params.seqs, at.sequence);
  const int row0 = at.block_m * Cfg::kBlockM;
  if (row0 >= seq.sq) return;
  const int num_rows = min(Cfg::kBlockM, seq.sq - row0);
  const int head_k = at.head / (params.hq / params.hk);

  const attn::Mask mask(params.scores, seq.sq, seq.sk);
  const attn::ScoreRule rule(params.scores, at.sequence, at.head);
  int block_begin = mask.lowest(row0) / Cfg::kBlockN;
  int block_end = (max(mask.highest(row0 + num_rows - 1), 0) + Cfg::kBlockN - 1) / Cfg::kBlockN;
  if (params.num_splits > 1) {
    const int per_split = (max(block_end - block_begin, 0) + params.num_splits - 1) / params.num_splits;
    block_begin += at.split * per_split;
    block_end = min(block_end, block_begin + per_split);
  }

  const uint16_t* q = attn::rows_of_q(params.q, params.seqs, seq, at.head) + row0 * params.q.row;
  const attn::KeyRows k(params.k, params.seqs, seq, head_k);
  const attn::KeyRows v(params.v, params.seqs, seq, head_k);
  const auto load = [&](uint32_t to, const attn::KeyRows& x, int block, int num_cols) {
    load_keys<Cfg>(to, x, block * Cfg::kBlockN, seq.sk, num_cols, thread);
    ptx::cp_async_commit();
  };

  typename Cfg::AccO o;
  attn::Softmax<Cfg::kRowTiles> softmax;
  o.clear();
  softmax.clear();
  if (block_begin < block_end) {
    tile::load_async<typename Cfg::TileQ, Cfg::kThreads>(
        q_smem, [&](int r) { return q + r * params.q.row; }, num_rows, params.d, thread);
    load(k_smem, k, block_end - 1, params.d);
  }
  for (int block = block_end - 1; block >= block_begin; --block) {
    const int first = block * Cfg::kBlockN;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is here, and everyone is done with V
    load(v_smem, v, block, params.dv);
    typename Cfg::AccS s;
    s.clear();
    tile::multiply_abt<T, typename Cfg::TileQ, typename Cfg::TileK>(s, q_smem, k_smem, warp_row,
                                                                    lane);
    ptx::cp_async_wait<0>();
    __syncthreads();  // V is here, and everyone is done with K
    if (block > block_begin) load(k_smem, k, block - 1, params.d);

    const int row = row0 + warp_row + lane / 4;
    const int col = first + lane % 4 * 2;
    if (!rule.is_plain) attn::transform(s, rule, mask, row, col);
    const bool all_visible = mask.lowest(row0 + num_rows - 1) <= first &&
                             mask.highest(row0) >= first + Cfg::kBlockN;
    if (!all_visible) attn::hide(s, mask, row, col);
    softmax.step(s, o, rule.softmax_scale_log2);
    if (params.scores.rng_state) {
      const attn::Dropout dropout(params.scores, at.sequence * params.hq + at.head);
      drop<Cfg>(s, dropout, row0 + warp_row, first, lane);
    }
    uint32_t p[Cfg::kRowTiles][Cfg::kBlockN / 16][4];
    tile::pack_a<T>(p, s);
    tile::multiply_pb<T, typename Cfg::TileK>(o, p, v_smem, lane);
  }

  const bool is_split = params.num_splits > 1;
  const float empty_lse = is_split ? -attn::infinity() : attn::infinity();
  softmax.finish(o, rule.softmax_scale_log2, params.scores.keep_scale, empty_lse);
  // Splits of dense rows: [split, b, hq, sq].
  const int64_t part = (static_cast<int64_t>(at.split * params.seqs.b + at.sequence) * params.hq +
                        at.head) * params.seqs.sq + row0;
  float* lse = is_split ? params.lse_partial + part
                        : params.lse + (params.seqs.cu_seqlens_q ? 0 : at.sequence * params.lse_batch) +
                              at.head * params.lse_head + seq.first_q + row0;
#pragma unroll
  for (int m = 0; m < Cfg::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = warp_row + 16 * m + lane / 4 + 8 * h;
      if (lane % 4 == 0 && r < num_rows) lse[r] = softmax.row_max[m][h];
    }
  }
  if (is_split) {
    store_part<Cfg>(o, params.o_partial + part * params.dv, num_rows, params.dv, warp_row, lane);
    return;
  }
  __syncthreads();  // Q's buffer changes hands
  uint16_t* to = attn::rows_of_q(params.o, params.seqs, seq, at.head) + row0 * params.o.row;
  store_o<Cfg>(o, q_smem, to, params.o.row, num_rows, params.dv, warp_row, thread);
}

}  // namespace flash::sm80
