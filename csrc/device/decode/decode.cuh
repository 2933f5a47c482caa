// Attention of few queries over a long cache, at the speed of memory.
//
// The rows of a tile are queries times the heads of a group, so that a key is read once for all of
// them; 16 rows or 64. A CTA has a ring of blocks of K and V. With 16 rows each of its warps, four
// or eight, has keys of its own, a softmax of its own and waits for its own copies alone; at the
// end of a sequence they merge. With 64 rows four warps share the keys and have 16 rows each.
//
//   find this CTA's share of all blocks (work.cuh)
//   start copies of the first blocks
//   for each (sequence, key-value head) of the share:
//     load Q, rotated if asked for
//     for each block: wait for it; start the copies of another; S = Q K^T; softmax; O += P V
//     merge the warps; store O, or a part of it; whoever stores the last part merges (merge.cuh)
//
// Copies run ahead over the borders of sequences, so memory never waits. New rows of the cache are
// taken in on the way (keys.cuh): one launch does all. Bound by memory: docs/kernels/decode.md.
// Sources: Flash-Decoding; Stream-K (arXiv:2301.03598).
#pragma once

#include "attn/scores.cuh"
#include "decode/config.h"
#include "decode/fp8.cuh"
#include "decode/keys.cuh"

namespace flash::decode {

template <class T_, int kHeadDim_, int kRows_>
struct Config {
  using T = T_;  // of K and V
  static constexpr bool kIsFp8 = tile::kIsFp8<T>;
  static constexpr Tile kTile = tile(kRows_, kHeadDim_, common::kArch, kIsFp8 ? 1 : 2);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kWarps = kTile.warps;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kScratchBytes = kTile.scratch_bytes();
  static constexpr int kRowWarps = kRows / 16;             // warps with the same keys
  static constexpr int kKeyGroups = kWarps / kRowWarps;    // of warps with the same rows
  static constexpr int kGroupKeys = kBlockN / kKeyGroups;  // of a block
  // Steps of Q that stay in registers, where there are some.
  static constexpr int kHeld = kRows == 16 && kHeadDim <= 128 ? kHeadDim / 16 : 0;
  static constexpr bool kHasClusters = ptx::kHasClusters && kTile.merges_in_clusters();
  static constexpr bool kMayBeClustered = kHasClusters && many_have_clusters(kRows);
  static constexpr bool kLoadsEarly = kHeld > 0;  // Q of the next pair
  // Parts of a pair, while its keys are read: more rows leave no registers for them.
  static constexpr bool kHoldsParts = kRows == 16;
  static_assert(kRowWarps == 1 || kKeyGroups == 1, "warps share either rows or keys");
  using TileQ = tile::SmemTile<kRows, kHeadDim>;
  using TileK = tile::SmemTile<kGroupKeys, kHeadDim * kTile.element_bytes / 2>;
  using HeldQ = tile::HeldA<1, kHeld>;
  using AccS = tile::Accumulators<1, kGroupKeys / 8>;
  using AccO = tile::Accumulators<1, kHeadDim / 8>;
  using Softmax = attn::Softmax<1>;
};

// What becomes of the scores of a lane's two rows. Keys are named by their slots.
struct RowRules {
  int low[2], high[2];  // slots that the row sees
  int position[2];
  float slope[2];
  int all_low, all_high;  // slots that every row sees

  __device__ RowRules(const DecodeParams& params, const attn::Sequence& seq, int head_k, int row) {
    const ForwardParams& call = params.call;
    const attn::Mask mask(call.scores, seq.sq, seq.sk);
    const int last = max(seq.sq - 1, 0);
    all_low = seq.skip + mask.lowest(last);
    all_high = seq.skip + mask.highest(0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Row at(params, head_k, row + 8 * h);
      const int i = min(at.position, last);
      low[h] = seq.skip + mask.lowest(i);
      high[h] = seq.skip + mask.highest(i);
      position[h] = seq.skip + i + mask.diagonal;
      slope[h] = 0.0f;
      if (call.scores.alibi_slopes && at.position == i) {
        slope[h] = call.scores.alibi_slopes[seq.index * call.scores.alibi_batch_stride + at.head];
      }
    }
  }

  // Softcap and ALiBi; the first entry of this lane is at slot `col`.
  template <int kN>
  __device__ void transform(tile::Accumulators<1, kN>& s, const Scores& scores, int col) const {
    const float inverse_cap = 1.0f / scores.softcap;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = s.c[0][n][i] * scores.softmax_scale;
        if (scores.softcap > 0.0f) x = scores.softcap * attn::tanh(x * inverse_cap);
        s.c[0][n][i] = x - slope[i / 2] * abs(position[i / 2] - (col + 8 * n + i % 2));
      }
    }
  }

  template <int kN>
  __device__ void hide(tile::Accumulators<1, kN>& s, int col) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = col + 8 * n + i % 2;
        if (slot < low[i / 2] || slot >= high[i / 2]) s.c[0][n][i] = -attn::infinity();
      }
    }
  }
};

// S += Q K^T, of a warp's 16 rows and its keys.
template <class Cfg>
__device__ inline void multiply_qk(typename Cfg::AccS& s, uint32_t q, uint32_t k, int row, int lane,
                                   const typename Cfg::HeldQ& held) {
  using TileQ = typename Cfg::TileQ;
  using TileK = typename Cfg::TileK;
  if constexpr (Cfg::kIsFp8) {
    tile::multiply_abt_fp8<TileQ, TileK>(s, q, k, row, lane, held);
  } else {
    tile::multiply_abt<typename Cfg::T, TileQ, TileK>(s, q, k, row, 0, lane, held);
  }
}

// O += P V.
template <class Cfg>
__device__ inline void multiply_pv(typename Cfg::AccO& o, const typename Cfg::AccS& p, uint32_t v,
                                   int lane) {
  using TileV = typename Cfg::TileK;
  if constexpr (Cfg::kIsFp8) {
    tile::multiply_pb_fp8<TileV>(o, p, v, lane);
  } else {
    tile::multiply_pb<typename Cfg::T, TileV>(o, p, v, lane);
  }
}

// Brings all parameters to this multiprocessor at once. Each line of them that is met on the way
// would cost a trip to L2.
__device__ inline void fetch(const DecodeParams& params, int lane) {
  constexpr int kLine = 64;
  constexpr int kLines = (sizeof(DecodeParams) + kLine - 1) / kLine;
  static_assert(kLines <= 32, "a lane takes a line");
  const auto* words = reinterpret_cast<const uint32_t*>(&params);
  ptx::touch(words[min(lane, kLines - 1) * (kLine / 4)]);
}

template <class Cfg>
__device__ inline void decode(const DecodeParams& params) {
  using TileQ = typename Cfg::TileQ;
  extern __shared__ __align__(128) unsigned char storage[];
  unsigned char* scratch = storage + Cfg::kStages * KeyRing<Cfg>::kStageBytes;
  auto* statistics = reinterpret_cast<float2*>(scratch + Cfg::kScratchBytes);
  const WarpRows<Cfg> warp_rows{statistics, reinterpret_cast<float*>(scratch)};
  auto* of_rows = reinterpret_cast<float*>(statistics);  // until the warps have statistics
  int* flag = reinterpret_cast<int*>(statistics + Cfg::kWarps * 16);
  const Exchange<Cfg> exchange(storage, flag + 2);
  const uint32_t q = ptx::smem_address(scratch);
  const ForwardParams& call = params.call;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp_row = thread / 32 % Cfg::kRowWarps * 16;
  const int warp_key = thread / 32 / Cfg::kRowWarps * Cfg::kGroupKeys;

  ptx::let_kernel_behind_begin();
  fetch(params, lane);
  ptx::wait_for_kernel_in_front();
  Walk<Cfg> walk(params);
  if (walk.left == 0) return;
  if (walk.cluster() > 0 && thread == 0) exchange.prepare();
  Queries<Cfg> queries;
  queries.load(params, walk.seq, walk.head, thread);  // they are needed first
  KeyRing<Cfg> ring(params, walk, ptx::smem_address(storage), thread);
#pragma unroll 1
  for (int i = 0; i < Cfg::kStages - 1; ++i) ring.start();

  const bool is_plain = attn::is_plain(call.scores);
  const float scale_log2 = is_plain ? call.scores.softmax_scale * attn::kLog2e : attn::kLog2e;
  for (;;) {
    const bool is_whole = walk.is_whole();
    const auto find_parts = [&] { return is_whole ? Parts{0, 1, 0} : walk.parts(); };
    const Parts held_parts = Cfg::kHoldsParts ? find_parts() : Parts{0, 1, 0};
    const RowRules rules(params, walk.seq, walk.head, warp_row + lane / 4);
    queries.store(params, walk.seq, walk.head, q, of_rows, thread);
    __syncthreads();
    // Its answer comes while keys and values are on their way.
    if (!is_whole && thread == Cfg::kThreads - 1) {
      const Parts parts = Cfg::kHoldsParts ? held_parts : find_parts();
      const int cluster = walk.cluster();
      const Parts in_memory = cluster > 0 ? parts.of_clusters(cluster) : parts;
      if (in_memory.count > 1) {
        attn::Counter{call.next_tile + in_memory.first}.open(params.call_number);
      }
    }
    typename Cfg::HeldQ held;
    held.template load<TileQ>(q, warp_row, lane);
    const typename Queries<Cfg>::Rescale rescale(of_rows, warp_row + lane / 4);
    typename Cfg::AccO o;
    typename Cfg::Softmax softmax;
    o.clear();
    softmax.clear();
    const int count = walk.here();
    int first = walk.block * Cfg::kBlockN + warp_key;
    for (int i = 0; i < count; ++i, first += Cfg::kBlockN) {
      ring.wait();
      ring.start();
      typename Cfg::AccS s;
      s.clear();
      multiply_qk<Cfg>(s, q, ring.k(), warp_row, lane, held);
      rescale.scores(s);
      const int col = first + lane % 4 * 2;
      if (!is_plain) rules.transform(s, call.scores, col);
      if (first < rules.all_low || first + Cfg::kGroupKeys > rules.all_high) rules.hide(s, col);
      softmax.follow(o, s, scale_log2);
      softmax.exponentiate(s, scale_log2);
      multiply_pv<Cfg>(o, s, ring.v(), lane);
      ring.pass();
    }
    rescale.results(o);
    __syncthreads();  // everyone is done with Q
    const attn::Sequence seq = walk.seq;
    const int head = walk.head;
    const Parts parts = Cfg::kHoldsParts ? held_parts : find_parts();
    walk.advance(count);
    const bool is_last = walk.left == 0;
    if (Cfg::kLoadsEarly && !is_last) queries.load(params, walk.seq, walk.head, thread);
    finish<Cfg>(params, seq, head, o, softmax, warp_rows, exchange, is_whole, parts, walk.cluster(),
                flag, thread);
    if (is_last) return;
    if (!Cfg::kLoadsEarly) queries.load(params, walk.seq, walk.head, thread);
    __syncthreads();  // everyone is done with scratch
  }
}

}  // namespace flash::decode
