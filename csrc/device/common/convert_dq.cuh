// Last step of the backward pass: dQ = scale * the sums that the main kernel left, rounded.
//
// A CTA takes tiles of rows of one head with the main kernel's threads, reads the sums in register
// order (copies one after the other, so that the order of additions is fixed), and stores through
// shared memory. Bound by memory. Where the main kernel counts what has been added, CTAs run beside
// it, on multiprocessors that it leaves to them, and take tile after tile when its head is
// complete.
#pragma once

#include "attn/sequence.cuh"
#include "tile/store.cuh"

namespace flash::common {

// Waits until all blocks of a head's keys are in the sums. All CTAs may wait for one counter: the
// more they are, the less often each looks.
template <class Cfg>
__device__ inline void wait_for_sums(const BackwardParams& params, const attn::Sequence& seq,
                                     int head) {
  const int blocks = (seq.sk + params.turn_keys - 1) / params.turn_keys;
  const int head_k = head / (params.hq / params.hk);
  ptx::wait_until_equal(params.finished + seq.index * params.hk + head_k, blocks * Cfg::kCounts,
                        4 * gridDim.x);
}

// Rounds tile `index`, of `tiles` for each head, by way of shared memory.
template <class Cfg>
__device__ inline void convert_tile(const BackwardParams& params, uint32_t smem, int index,
                                    int tiles) {
  using Tile = typename Cfg::TileQ;
  const int thread = threadIdx.x;
  const int head = index / tiles % params.hq;
  const int row0 = index % tiles * Cfg::kBlockM;
  const int at = index / (params.hq * tiles);
  const attn::Sequence seq(params.seqs, params.order ? static_cast<int>(params.order[2 * at]) : at);
  if (row0 >= seq.sq) return;

  const attn::PaddedRows padded(params, seq.index, head);
  if constexpr (Cfg::kCounts > 0) {
    if (thread == 0) wait_for_sums<Cfg>(params, seq, head);
    __syncthreads();
  }
  const float* sums = params.dq_accum + (padded.first + row0) * Cfg::kHeadDim;
  typename Cfg::AccQ dq;
  if constexpr (Cfg::kCounts > 0) {
    Cfg::OrderQ::load(dq, sums, thread);
  } else {
    dq.clear();
    for (int copy = 0; copy < params.dq_copies; ++copy) {
      Cfg::OrderQ::load_add(dq, sums + copy * params.dq_accum_copy, thread);
    }
  }
  tile::store_rounded<typename Cfg::T, Tile>(smem, dq, params.scores.softmax_scale,
                                             Cfg::q_row(thread), Cfg::q_col(thread), thread % 32);
  __syncthreads();
  tile::copy_out<Tile, Cfg::kThreads>(
      attn::rows_of_q(params.dq, params.seqs, seq, head) + row0 * params.dq.row, params.dq.row,
      smem, seq.sq - row0, params.d, thread);
}

// Cfg is the main kernel's. Grid: tiles of the longest head, times hq, times b; or as many CTAs as
// run at once.
template <class Cfg>
__device__ inline void convert_dq(const BackwardParams& params) {
  __shared__ __align__(128) unsigned char storage[Cfg::TileQ::kBytes];
  const uint32_t smem = ptx::smem_address(storage);
  const int tiles = (params.seqs.sq + Cfg::kBlockM - 1) / Cfg::kBlockM;
  if constexpr (Cfg::kCounts == 0) {
    // The last heads come first: of their sums most are still in L2.
    convert_tile<Cfg>(params, smem, gridDim.x - 1 - blockIdx.x, tiles);
  } else {
    __shared__ int taken;
    const auto take = [&] {
      return threadIdx.x == 0 ? static_cast<int>(ptx::atomic_add(params.next_block + 1, 1)) : 0;
    };
    int next = take();
    for (;;) {
      if (threadIdx.x == 0) taken = next;
      __syncthreads();
      const int index = taken;
      if (index >= tiles * params.hq * params.seqs.b) break;
      next = take();
      convert_tile<Cfg>(params, smem, index, tiles);
      __syncthreads();
    }
    ptx::wait_for_kernel_in_front();  // this kernel ends behind it
  }
}

}  // namespace flash::common
