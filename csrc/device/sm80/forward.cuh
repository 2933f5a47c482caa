// Forward attention for cc >= 8.0: O = softmax(scores(Q K^T)) V and its log-sum-exp.
//
// One CTA computes block_m rows of one head, warp w its rows [w R, w R + R), R = 16 or 32. Blocks
// of keys run from the last to the first. K and V have two buffers, so that a step has one barrier:
//
//   load Q, K(last), V(last)
//   for block j, descending:
//     S = Q K(j)^T                       behind the first fragments: load K(j - 1), V(j - 1)
//     transform, hide where they must
//     softmax: S -> P; O is rescaled only where a maximum grew by much
//     O += P V(j)                        P stays in registers: accumulators are an A operand
//     wait K(j - 1), V(j - 1); sync
//   O / sum -> Q's buffer -> 16-byte stores
//
// With one buffer each, V(j) is loaded while S is computed and K(j - 1) while O is. Two CTAs share
// an SM: the softmax of one runs beside the products of the other. Shared memory: (block_m + 2
// stages block_n) head_dim 2 bytes (config.h). What bounds it, and what was measured:
// docs/kernels/sm80.md. Sources: FlashAttention-2 (arXiv:2307.08691).
#pragma once

#include "attn/dropout.cuh"
#include "attn/schedule.cuh"
#include "attn/scores.cuh"
#include "attn/sequence.cuh"
#include "attn/softmax.cuh"
#include "sm80/config.h"
#include "tile/load.cuh"
#include "tile/products.cuh"
#include "tile/store.cuh"

namespace flash::sm80 {

template <class T_, int kHeadDim_>
struct ForwardConfig {
  using T = T_;
  static constexpr ForwardTile kTile = forward_tile(kHeadDim_, kArch);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages;
  // Loads of a step start behind its first products, unless the tile has registers for neither.
  static constexpr bool kLoadsLate = kTile.stages == 2 || kTile.held > 0;
  static constexpr int kRows = kTile.rows_per_warp();
  using TileQ = tile::SmemTile<kBlockM, kHeadDim>;
  using TileK = tile::SmemTile<kBlockN, kHeadDim>;
  using HeldQ = tile::HeldA<kRows / 16, kTile.held>;
  using AccS = tile::Accumulators<kRows / 16, kBlockN / 8>;
  using AccO = tile::Accumulators<kRows / 16, kHeadDim / 8>;
  using Softmax = attn::Softmax<kRows / 16>;

  __device__ static int warp_row(int thread) { return thread / 32 * kRows; }
};

// Addresses of the shared-memory buffers.
template <class Cfg>
struct ForwardBuffers {
  uint32_t q;

  __device__ uint32_t k(int stage) const {
    return q + Cfg::TileQ::kBytes + stage * 2 * Cfg::TileK::kBytes;
  }
  __device__ uint32_t v(int stage) const { return k(stage) + Cfg::TileK::kBytes; }
};

// Blocks of keys that some row of a CTA sees; of a split call, those of one part.
template <class Cfg>
__device__ inline attn::Keys key_blocks(const attn::Mask& mask, int row0, int num_rows, int split,
                                        uint32_t num_splits) {
  constexpr int kBlockN = Cfg::kBlockN;
  const int last_row = row0 + num_rows - 1;
  const int begin = mask.lowest(row0) / kBlockN;
  const int end = (max(mask.highest(last_row), 0) + kBlockN - 1) / kBlockN;
  return attn::part_of({begin, end}, split, num_splits);
}

// Blocks of K, or of V, on their way to shared memory, from the last to the first.
template <class Cfg>
struct KeyStream {
  using Loader = tile::RowLoader<typename Cfg::TileK, Cfg::kThreads>;
  const Rows& operand;
  const int num_cols;
  const uint16_t* from;  // this thread's share of what was loaded last; not for pages

  __device__ KeyStream(const Rows& operand, int num_cols, const attn::KeyRows& rows, int block,
                       int thread)
      : operand(operand), num_cols(num_cols) {
    const int64_t row = (block + 1) * Cfg::kBlockN;
    from = rows.base + row * operand.row + Loader::begin(operand.row, thread);
  }

  // Loads a block of which `num_rows` rows exist.
  __device__ void load(uint32_t to, int num_rows, int thread) {
    Loader::load_back(to, from, operand.row, num_rows, num_cols, thread);
  }

  // Back to the block loaded last.
  __device__ void rewind() { from += Cfg::kBlockN * operand.row; }

  // Loads a whole block, if `is_due`, to a buffer whose columns behind num_cols are clear.
  __device__ void reload(uint32_t to, bool is_due, int thread) {
    Loader::reload_back(to, from, operand.row, is_due ? num_cols : 0, thread);
  }
};

// Takes the entries that dropout drops out of the product with V.
template <class Cfg>
__device__ inline void drop(typename Cfg::AccS& s, typename Cfg::Softmax& softmax,
                            const attn::Dropout& dropout, int row, int col, float scale, int lane) {
#pragma unroll
  for (int m = 0; m < Cfg::kRows / 16; ++m) {
#pragma unroll
    for (int g = 0; g < Cfg::kBlockN / 32; ++g) {
      uint32_t words[4];
      dropout.bytes(words, row + 16 * m, col + 32 * g, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!dropout.keeps(words, i / 2, n, i % 2)) {
            softmax.drop(s.c[m][4 * g + n][i], m, i / 2, scale);
          }
        }
      }
    }
  }
}

// Normalises and stores O and its log-sum-exp.
template <class Cfg>
__device__ inline void store(const ForwardParams& params, const attn::TileIndex& at,
                             const attn::Sequence& seq, typename Cfg::AccO& o,
                             typename Cfg::Softmax& softmax, uint32_t smem, int thread) {
  const int lane = thread % 32;
  const int row = Cfg::warp_row(thread);
  const int row0 = at.block_m * Cfg::kBlockM;
  const int num_rows = min(Cfg::kBlockM, seq.sq - row0);
  const bool is_split = params.num_splits > 1;
  softmax.finish(o, params.scores.keep_scale, is_split ? -attn::infinity() : attn::infinity());
  const int split = attn::split_index(params.num_splits);
  const int64_t part = attn::row_of_part(params, split, at.sequence, at.head) + row0;
  const int64_t batch = params.seqs.cu_seqlens_q ? 0 : at.sequence * params.lse_batch;
  float* lse = is_split ? params.lse_partial + part
                        : params.lse + batch + at.head * params.lse_head + seq.first_q + row0;
#pragma unroll
  for (int m = 0; m < Cfg::kRows / 16; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * m + lane / 4 + 8 * h;
      if (lane % 4 == 0 && r < num_rows) lse[r] = softmax.shift[m][h];
    }
  }
  if (is_split) {
    tile::store_floats(params.o_partial + part * params.dv, o, {1.0f, 1.0f}, num_rows, params.dv,
                       row, lane);
    return;
  }
  // A warp's rows of Q are read by that warp alone: they make room for its rows of O.
  tile::store_rounded<typename Cfg::T, typename Cfg::TileQ>(smem, o, 1.0f, row, 0, lane);
  __syncwarp();
  tile::copy_out_rows<typename Cfg::TileQ, Cfg::kRows>(
      attn::rows_of_q(params.o, params.seqs, seq, at.head) + (row0 + row) * params.o.row,
      params.o.row, smem, row, num_rows - row, params.dv, lane);
}

template <class Cfg>
__device__ inline void forward(const ForwardParams& params) {
  using T = typename Cfg::T;
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  extern __shared__ __align__(128) unsigned char storage[];
  const ForwardBuffers<Cfg> smem{ptx::smem_address(storage)};
  int thread = threadIdx.x;

  const int num_blocks = (params.seqs.sq + Cfg::kBlockM - 1) / Cfg::kBlockM;
  const int split = attn::split_index(params.num_splits);
  const attn::TileIndex at(blockIdx.x - split * num_blocks * params.hq * params.seqs.b, num_blocks,
                           params.hq, params.seqs.b, params.heads_per_section);
  const attn::Sequence seq(params.seqs, at.sequence);
  const int row0 = at.block_m * Cfg::kBlockM;
  if (row0 >= seq.sq) return;
  const int num_rows = min(Cfg::kBlockM, seq.sq - row0);
  const uint16_t* q = attn::rows_of_q(params.q, params.seqs, seq, at.head);
  tile::load_rows<TileQ, Cfg::kThreads>(smem.q, q + row0 * params.q.row, params.q.row, num_rows,
                                        params.d, thread);
  const attn::Mask mask(params.scores, seq.sq, seq.sk);
  const attn::Keys blocks = key_blocks<Cfg>(mask, row0, num_rows, split, params.num_splits);
  const int last = blocks.end - 1;

  const int head_k = attn::key_head(at.head, params.hq, params.hk);
  KeyStream<Cfg> k(params.k, params.d, attn::KeyRows(params.k, params.seqs, seq, head_k), last,
                   thread);
  KeyStream<Cfg> v(params.v, params.dv, attn::KeyRows(params.v, params.seqs, seq, head_k), last,
                   thread);
  const bool is_paged = params.seqs.block_table != nullptr;
  const auto load = [&](uint32_t to, KeyStream<Cfg>& x, int block, int num_rows) {
    if (is_paged) {
      attn::Sequence here = seq;
      here.cache_row = ptx::opaque(here.cache_row);
      const int head = attn::key_head(ptx::opaque(at.head), params.hq, params.hk);
      const attn::KeyRows pages(x.operand, params.seqs, here, head);
      const int first = block * Cfg::kBlockN;
      const auto source = [&](int r) { return pages.paged_row(first + r, seq.sk); };
      KeyStream<Cfg>::Loader::gather(to, source, seq.sk - first, x.num_cols, thread);
    } else {
      x.load(to, num_rows, thread);
    }
  };
  const int num_keys = seq.sk - last * Cfg::kBlockN;
  if (blocks.begin < blocks.end) load(smem.k(0), k, last, num_keys);
  ptx::cp_async_commit();
  if (blocks.begin < blocks.end) {
    load(smem.v(0), v, last, num_keys);
    if (Cfg::kStages == 1 && Cfg::kLoadsLate) v.rewind();
    // Columns of V behind its head dim meet columns of O that nobody stores.
    if (Cfg::kStages == 2 && params.d < Cfg::kHeadDim) {
      tile::clear<TileK, Cfg::kThreads>(smem.k(1), thread);
    }
  }
  ptx::cp_async_commit();
  const attn::ScoreRule rule(params.scores, at.sequence, at.head);
  // From this block on, some row does not see all of a block's right side; -1: all blocks are
  // special.
  const int full_end = rule.is_plain ? max(mask.highest(row0), 0) / Cfg::kBlockN : -1;
  typename Cfg::HeldQ held;
  typename Cfg::AccO o;
  typename Cfg::Softmax softmax;
  o.clear();
  softmax.clear();
  ptx::cp_async_wait<1>();
  __syncthreads();  // Q and K are here
  held.template load<TileQ>(smem.q, Cfg::warp_row(thread), thread % 32);

  for (int block = last, left = blocks.end - blocks.begin; left > 0; --block, --left) {
    thread = ptx::opaque(thread);
    const int this_stage = Cfg::kStages == 2 ? (last - block) & 1 : 0;
    const int stage = Cfg::kStages == 2 ? this_stage ^ 1 : 0;
    const bool is_last = left == 1;
    if (Cfg::kStages == 2 && is_paged && !is_last) {
      load(smem.k(stage), k, block - 1, Cfg::kBlockN);
      load(smem.v(stage), v, block - 1, Cfg::kBlockN);
    }
    if (Cfg::kStages == 1 && block < last && (is_paged || !Cfg::kLoadsLate)) {
      load(smem.v(0), v, block, Cfg::kBlockN);
    }
    const auto load_next = [&] {
      if (!Cfg::kLoadsLate) return;
      const bool is_due = (Cfg::kStages == 2 ? !is_last : block < last) && !is_paged;
      if (Cfg::kStages == 2) k.reload(smem.k(stage), is_due, thread);
      v.reload(smem.v(stage), is_due, thread);
    };
    typename Cfg::AccS s;
    s.clear();
    tile::multiply_abt<T, TileQ, TileK>(s, smem.q, smem.k(this_stage), Cfg::warp_row(thread), 0,
                                        thread % 32, held, load_next);
    ptx::cp_async_commit();
    if (Cfg::kStages == 1 || block == last) {
      ptx::cp_async_wait<Cfg::kStages - 1>();
      __syncthreads();  // V is here; with one buffer, everyone is done with K
    }
    if (Cfg::kStages == 1 && !is_last) load(smem.k(0), k, block - 1, Cfg::kBlockN);
    if (Cfg::kStages == 1) ptx::cp_async_commit();

    const int first = block * Cfg::kBlockN;
    const bool is_cut_left = mask.lowest(row0 + Cfg::kBlockM - 1) > first;
    if (is_cut_left || block >= full_end) {
      thread = ptx::opaque(thread);
      const int row = row0 + Cfg::warp_row(thread) + thread % 32 / 4;
      const int col = first + thread % 4 * 2;
      if (full_end < 0) attn::transform(s, rule, mask, row, col);
      attn::hide(s, mask, row, col);
    }
    softmax.follow(o, s, rule.softmax_scale_log2);
    if (params.scores.rng_state) {
      thread = ptx::opaque(thread);
      const attn::Dropout dropout(params.scores, at.sequence * params.hq + at.head);
      drop<Cfg>(s, softmax, dropout, row0 + Cfg::warp_row(thread), first, rule.softmax_scale_log2,
                thread % 32);
    }
    softmax.exponentiate(s, rule.softmax_scale_log2);
    tile::multiply_pb<T, TileK>(o, s, smem.v(this_stage), thread % 32);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the next block is here, and everyone is done with this one
  }
  // Kept from above, what the sequence tells would take registers in the loop.
  store<Cfg>(params, at, attn::Sequence(params.seqs, ptx::opaque(at.sequence)), o, softmax, smem.q,
             ptx::opaque(thread));
}

}  // namespace flash::sm80
