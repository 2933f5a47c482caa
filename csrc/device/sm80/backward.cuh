// Backward attention for cc >= 8.0: dK and dV of a block of keys, and its share of dQ.
//
//   P = 2^(scores log2e - lse log2e)    dV = P^T dO     dP = dO V^T
//   dS = P (dP - delta)                 dK = dS^T Q     dQ = dS K      (dK and dQ times scale)
//
// One CTA owns block_n keys of one key-value head; K and V stay in shared memory, dK and dV in
// registers, over all query heads of the group: dK and dV have one order of summation. dQ is added
// to float sums in global memory. The five products of a step share out the warps in three ways
// (config.h): S and dP by queries x keys, dV and dK by keys x columns, dQ by queries x columns.
//
//   load K, V, Q(0), dO(0)
//   for step t over (query head, block of queries that sees the keys):
//     wait Q(t), dO(t); sync
//     load Q(t + 1), dO(t + 1)          (2 stages; with 1 stage: at the end, after a sync)
//     S = Q K^T; dP - delta = dO V^T - delta; P, dS -> shared memory, rounded
//     sync
//     dV += P^T dO; dQ = dS K -> global sums; dK += dS^T Q
//   dK, dV -> K's and V's buffers -> 16-byte stores
//
// Shared memory: BackwardTile::smem_bytes(). Bound by shared-memory reads (ldmatrix), then the
// tensor cores. Sources: FlashAttention-2 (arXiv:2307.08691).
#pragma once

#include "attn/dropout.cuh"
#include "attn/schedule.cuh"
#include "attn/scores.cuh"
#include "attn/sequence.cuh"
#include "sm80/config.h"
#include "tile/load.cuh"
#include "tile/products.cuh"
#include "tile/store.cuh"

namespace flash::sm80 {

template <class T_, int kHeadDim_>
struct BackwardConfig {
  using T = T_;
  static constexpr BackwardTile kTile = backward_tile(kHeadDim_, kArch);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages;
  // What one warp computes of S and dP, of dK and dV, and of dQ.
  static constexpr int kRowsS = kBlockM / kTile.warps_s;
  static constexpr int kColsS = kBlockN * kTile.warps_s / kTile.warps;
  static constexpr int kRowsKV = kBlockN / kTile.warps_kv;
  static constexpr int kColsKV = kHeadDim * kTile.warps_kv / kTile.warps;
  static constexpr int kRowsQ = kBlockM / kTile.warps_q;
  static constexpr int kColsQ = kHeadDim * kTile.warps_q / kTile.warps;
  static_assert(kColsS % 16 == 0 && kColsKV % 16 == 0 && kColsQ % 16 == 0, "ldmatrix takes 16");
  static_assert(kBlockM <= kThreads, "a thread loads lse and delta of a row");
  static_assert(128 % kBlockM == 0, "sequences start at multiples of 128 rows in dq_accum");
  using TileQ = tile::SmemTile<kBlockM, kHeadDim>;
  using TileK = tile::SmemTile<kBlockN, kHeadDim>;
  using TileP = tile::SmemTile<kBlockM, kBlockN>;
  using AccS = tile::Accumulators<kRowsS / 16, kColsS / 8>;
  using AccKV = tile::Accumulators<kRowsKV / 16, kColsKV / 8>;
  using AccQ = tile::Accumulators<kRowsQ / 16, kColsQ / 8>;
  using OrderQ = tile::RegisterOrder<kThreads>;
  static constexpr int kCounts = 0;  // of finished blocks of keys

  __device__ static int s_row(int thread) { return thread / 32 % kTile.warps_s * kRowsS; }
  __device__ static int s_col(int thread) { return thread / 32 / kTile.warps_s * kColsS; }
  __device__ static int kv_row(int thread) { return thread / 32 % kTile.warps_kv * kRowsKV; }
  __device__ static int kv_col(int thread) { return thread / 32 / kTile.warps_kv * kColsKV; }
  __device__ static int q_row(int thread) { return thread / 32 % kTile.warps_q * kRowsQ; }
  __device__ static int q_col(int thread) { return thread / 32 / kTile.warps_q * kColsQ; }
};

// Addresses of the shared-memory buffers.
template <class Cfg>
struct Buffers {
  static constexpr int kStage = 2 * Cfg::TileQ::kBytes;
  uint32_t base;

  __device__ uint32_t q(int stage) const { return base + stage * kStage; }
  __device__ uint32_t dout(int stage) const { return q(stage) + Cfg::TileQ::kBytes; }
  __device__ uint32_t k() const { return base + Cfg::kStages * kStage; }
  __device__ uint32_t v() const { return k() + Cfg::TileK::kBytes; }
  __device__ uint32_t p() const { return v() + Cfg::TileK::kBytes; }
  __device__ uint32_t ds() const { return p() + Cfg::TileP::kBytes; }
  // Floats, one for each query.
  __device__ uint32_t lse(int stage) const {
    return ds() + Cfg::TileP::kBytes + stage * 2 * Cfg::kBlockM * 4;
  }
  __device__ uint32_t delta(int stage) const { return lse(stage) + Cfg::kBlockM * 4; }
};

// Where the rows of one query head stand.
struct QueryHead {
  const uint16_t* q;
  const uint16_t* dout;
  const float* lse;
  const float* delta;
  float* dq_accum;

  __device__ QueryHead(const BackwardParams& params, const attn::Sequence& seq, float* accum,
                       int head) {
    q = attn::rows_of_q(params.q, params.seqs, seq, head);
    dout = attn::rows_of_q(params.dout, params.seqs, seq, head);
    lse = params.lse + (params.seqs.cu_seqlens_q ? 0 : seq.index * params.lse_batch) +
          head * params.lse_head + seq.first_q;
    const int64_t first = attn::PaddedRows(params, seq.index, head).first;
    delta = params.delta + first;
    dq_accum = accum + first * params.dq_cols;
  }
};

// Loads Q, dO, lse and delta of rows [row0, ...) of a query head.
template <class Cfg>
__device__ inline void load_queries(const BackwardParams& params, const QueryHead& from,
                                    const Buffers<Cfg>& smem, int stage, int row0, int num_rows,
                                    int thread) {
  using Tile = typename Cfg::TileQ;
  tile::load_rows<Tile, Cfg::kThreads>(smem.q(stage), from.q + row0 * params.q.row, params.q.row,
                                       num_rows, params.d, thread);
  tile::load_rows<Tile, Cfg::kThreads>(smem.dout(stage), from.dout + row0 * params.dout.row,
                                       params.dout.row, num_rows, params.dv, thread);
  if (thread < Cfg::kBlockM) {
    ptx::cp_async_4(smem.lse(stage) + 4 * thread, from.lse + row0 + thread, thread < num_rows);
    ptx::cp_async_4(smem.delta(stage) + 4 * thread, from.delta + row0 + thread, thread < num_rows);
  }
  ptx::cp_async_commit();
}

// Which entries of a lane's part of S dropout keeps: a bit each.
template <class Cfg>
struct Kept {
  static constexpr int kStep = Cfg::kColsS % 32 == 0 ? 32 : 16;  // columns of one call
  static constexpr int kBits = kStep / 8 * 4;
  uint32_t bits[Cfg::kRowsS / 16][Cfg::kColsS / kStep];

  Kept() = default;

  __device__ Kept(const attn::Dropout& dropout, int row, int col, int lane) {
#pragma unroll
    for (int m = 0; m < Cfg::kRowsS / 16; ++m) {
#pragma unroll
      for (int g = 0; g < Cfg::kColsS / kStep; ++g) {
        uint32_t words[4];
        dropout.bytes(words, row + 16 * m, col + kStep * g, lane);
        if ((col + kStep * g) % 32 != 0) {
          words[0] = words[1];
          words[2] = words[3];
        }
        bits[m][g] = 0;
#pragma unroll
        for (int at = 0; at < kBits; ++at) {
          if (dropout.keeps(words, at / 2 % 2, at / 4, at % 2)) bits[m][g] |= 1u << at;
        }
      }
    }
  }

  // Entries x become y + factor (x - y) where they are kept, else y = shift[row].
  __device__ void apply(typename Cfg::AccS& x, float factor,
                        const float (&shift)[Cfg::kRowsS / 16][2]) const {
#pragma unroll
    for (int m = 0; m < Cfg::kRowsS / 16; ++m) {
#pragma unroll
      for (int n = 0; n < Cfg::kColsS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = n * 4 + i;
          const bool keeps = bits[m][at / kBits] >> (at % kBits) & 1;
          const float y = shift[m][i / 2];
          x.c[m][n][i] = keeps ? y + factor * (x.c[m][n][i] - y) : y;
        }
      }
    }
  }
};

// A value of each of a lane's rows of S, times `factor`.
template <class Cfg>
__device__ inline void load_of_rows(float (&x)[Cfg::kRowsS / 16][2], uint32_t smem, float factor,
                                    int row, int lane) {
#pragma unroll
  for (int m = 0; m < Cfg::kRowsS / 16; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x[m][h] = ptx::ld_shared_f32(smem + 4 * (row + 16 * m + 8 * h + lane / 4)) * factor;
    }
  }
}

// Rows from `num_rows` on get P 0, as rows without keys do, whose lse is +inf.
template <class Cfg>
__device__ inline void hide_rows(float (&lse)[Cfg::kRowsS / 16][2], int num_rows) {
#pragma unroll
  for (int m = 0; m < Cfg::kRowsS / 16; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (16 * m + 8 * h >= num_rows) lse[m][h] = attn::infinity();
    }
  }
}

// S becomes P, where `lse` is in base 2.
template <class Cfg>
__device__ inline void exponentiate(typename Cfg::AccS& s, const float (&lse)[Cfg::kRowsS / 16][2],
                                    float scale_log2) {
#pragma unroll
  for (int m = 0; m < Cfg::kRowsS / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Cfg::kColsS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s.c[m][n][i] = ptx::ex2(s.c[m][n][i] * scale_log2 - lse[m][i / 2]);
      }
    }
  }
}

template <class Cfg>
__device__ inline void scale_by(typename Cfg::AccS& ds, const typename Cfg::AccS& p) {
#pragma unroll
  for (int m = 0; m < Cfg::kRowsS / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Cfg::kColsS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds.c[m][n][i] *= p.c[m][n][i];
    }
  }
}

// dK and dV of keys [first, first + kBlockN) of one key-value head; `dq_accum` is the copy to add
// to.
template <class Cfg>
__device__ inline void block_of_keys(const BackwardParams& params, const attn::Sequence& seq,
                                     const Buffers<Cfg>& smem, float* dq_accum, int head_k,
                                     int first, int thread) {
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  using TileP = typename Cfg::TileP;
  const int num_keys = min(Cfg::kBlockN, seq.sk - first);
  const attn::Mask mask(params.scores, seq.sq, seq.sk);
  const int begin = mask.first_query(first) / Cfg::kBlockM;
  const int end = (mask.end_query(first + num_keys - 1) + Cfg::kBlockM - 1) / Cfg::kBlockM;
  const int group = params.hq / params.hk;
  int head = head_k * group;
  const int end_head = begin < end ? head + group : head;

  // Queries that see all of the block's keys.
  const int full_begin = num_keys == Cfg::kBlockN ? mask.first_query(first + num_keys - 1) : seq.sq;
  const int full_end = mask.end_query(first);

  QueryHead rows(params, seq, dq_accum, head);
  if (head < end_head) {
    tile::load_rows<TileK, Cfg::kThreads>(
        smem.k(), attn::rows_of_k(params.k, params.seqs, seq, head_k) + first * params.k.row,
        params.k.row, num_keys, params.d, thread);
    tile::load_rows<TileK, Cfg::kThreads>(
        smem.v(), attn::rows_of_k(params.v, params.seqs, seq, head_k) + first * params.v.row,
        params.v.row, num_keys, params.dv, thread);
    load_queries(params, rows, smem, 0, begin * Cfg::kBlockM, seq.sq - begin * Cfg::kBlockM,
                 thread);
  }
  typename Cfg::AccKV dk, dv;
  dk.clear();
  dv.clear();
  const auto compute_scores = [&](int head, int row0, int stage) {
    thread = ptx::opaque(thread);
    const int lane = thread % 32;
    const int row = Cfg::s_row(thread);
    const int col = Cfg::s_col(thread);
    typename Cfg::AccS s, ds;
    float lse[Cfg::kRowsS / 16][2], minus_delta[Cfg::kRowsS / 16][2];
    s.clear();
    tile::multiply_abt<T, TileQ, TileK>(s, smem.q(stage), smem.k(), row, col, lane);
    load_of_rows<Cfg>(lse, smem.lse(stage), attn::kLog2e, row, lane);
    load_of_rows<Cfg>(minus_delta, smem.delta(stage), -1.0f, row, lane);
    ds.fill_rows(minus_delta);
    const attn::ScoreRule rule(params.scores, seq.index, head);
    const bool all_visible = row0 + row >= full_begin && row0 + row + Cfg::kRowsS <= full_end;
    const bool drops = params.scores.rng_state != nullptr;
    // Without a branch in between, the exponentials run beside the tensor cores.
    if (rule.is_plain && all_visible && !drops) {
      exponentiate<Cfg>(s, lse, rule.softmax_scale_log2);
      tile::multiply_abt<T, TileQ, TileK>(ds, smem.dout(stage), smem.v(), row, col, lane);
      scale_by<Cfg>(ds, s);
    } else {
      tile::multiply_abt<T, TileQ, TileK>(ds, smem.dout(stage), smem.v(), row, col, lane);
      const int lane_row = row0 + row + lane / 4;
      const int lane_col = first + col + lane % 4 * 2;
      Kept<Cfg> kept;
      if (drops) {
        const attn::Dropout dropout(params.scores, seq.index * params.hq + head);
        kept = Kept<Cfg>(dropout, row0 + row, first + col, lane);
        kept.apply(ds, params.scores.keep_scale, minus_delta);
      }
      if (!rule.is_plain) attn::transform(s, ds, rule, mask, lane_row, lane_col);
      attn::hide_by_comparisons(s, mask, lane_row, lane_col);
      hide_rows<Cfg>(lse, seq.sq - lane_row);
      exponentiate<Cfg>(s, lse, rule.softmax_scale_log2);
      scale_by<Cfg>(ds, s);
      if (drops) {
        constexpr float kZeros[Cfg::kRowsS / 16][2] = {};
        kept.apply(s, params.scores.keep_scale, kZeros);
      }
    }
    tile::store_rounded<T, TileP>(smem.p(), s, 1.0f, row, col, lane);
    tile::store_rounded<T, TileP>(smem.ds(), ds, 1.0f, row, col, lane);
  };
  const auto add_gradients = [&](float* dq_rows, int stage) {
    thread = ptx::opaque(thread);
    const int lane = thread % 32;
    const int row = Cfg::kv_row(thread);
    const int col = Cfg::kv_col(thread);
    tile::multiply_atb<T, TileP, TileQ>(dv, smem.p(), smem.dout(stage), row, col, lane);
    typename Cfg::AccQ dq;
    dq.clear();
    tile::multiply_ab<T, TileP, TileK>(dq, smem.ds(), smem.k(), Cfg::q_row(thread),
                                       Cfg::q_col(thread), lane);
    Cfg::OrderQ::add(dq_rows, dq, thread);
    tile::multiply_atb<T, TileP, TileQ>(dk, smem.ds(), smem.q(stage), row, col, lane);
  };

  int block_m = begin;
  int stage = 0;
  while (head < end_head) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // Q and dO are here, and everyone is done with the step before
    thread = ptx::opaque(thread);
    const int this_head = head;
    const int this_stage = stage;
    const int row0 = block_m * Cfg::kBlockM;
    float* const dq_rows = rows.dq_accum + row0 * Cfg::kHeadDim;
    if (++block_m == end) {
      block_m = begin;
      if (++head < end_head) rows = QueryHead(params, seq, dq_accum, head);
    }
    if (Cfg::kStages == 2) stage ^= 1;
    const int next_row0 = block_m * Cfg::kBlockM;
    if (Cfg::kStages == 2 && head < end_head) {
      load_queries(params, rows, smem, stage, next_row0, seq.sq - next_row0, thread);
    }
    compute_scores(this_head, row0, this_stage);
    __syncthreads();  // P and dS are here
    add_gradients(dq_rows, this_stage);
    if (Cfg::kStages == 1 && head < end_head) {
      __syncthreads();  // everyone is done with Q and dO
      load_queries(params, rows, smem, stage, next_row0, seq.sq - next_row0, thread);
    }
  }

  __syncthreads();  // the buffers of K and V change hands
  thread = ptx::opaque(thread);
  const int lane = thread % 32;
  const int row = Cfg::kv_row(thread);
  const int col = Cfg::kv_col(thread);
  tile::store_rounded<T, TileK>(smem.k(), dk, params.scores.softmax_scale, row, col, lane);
  tile::store_rounded<T, TileK>(smem.v(), dv, 1.0f, row, col, lane);
  __syncthreads();
  tile::copy_out<TileK, Cfg::kThreads>(
      attn::rows_of_k(params.dk, params.seqs, seq, head_k) + first * params.dk.row, params.dk.row,
      smem.k(), num_keys, params.d, thread);
  tile::copy_out<TileK, Cfg::kThreads>(
      attn::rows_of_k(params.dv_grad, params.seqs, seq, head_k) + first * params.dv_grad.row,
      params.dv_grad.row, smem.v(), num_keys, params.dv, thread);
}

template <class Cfg>
__device__ inline void backward(const BackwardParams& params) {
  extern __shared__ __align__(128) unsigned char storage[];
  const Buffers<Cfg> smem{ptx::smem_address(storage)};
  const int num_blocks = (params.seqs.sk + Cfg::kBlockN - 1) / Cfg::kBlockN;
  const int columns = params.deterministic ? params.dq_copies : num_blocks;
  const attn::TileIndex at(blockIdx.x, columns, params.hk, params.seqs.b, params.heads_per_section);
  // The first keys are seen by most queries under a causal mask: their blocks start first.
  const int column = columns - 1 - at.block_m;
  const attn::Sequence seq(params.seqs, at.sequence);
  float* dq_accum = params.dq_accum;
  if (params.deterministic) dq_accum += column * params.dq_accum_copy;
  for (int block = column; block * Cfg::kBlockN < seq.sk; block += columns) {
    block_of_keys(params, seq, smem, dq_accum, at.head, block * Cfg::kBlockN, threadIdx.x);
    __syncthreads();  // the buffers change hands again
  }
}

}  // namespace flash::sm80
