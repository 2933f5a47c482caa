// Last step of the backward pass: dQ = scale * the sums that the main kernel left, rounded.
//
// A CTA takes one tile of rows of one head with the main kernel's threads, reads the sums in
// register order (copies one after the other, so that the order of additions is fixed), and stores
// through shared memory. Bound by memory.
#pragma once

#include "attn/sequence.cuh"
#include "tile/store.cuh"

namespace flash::common {

// Cfg is the main kernel's. Grid: tiles of the longest head, times hq, times b.
template <class Cfg>
__device__ inline void convert_dq(const BackwardParams& params) {
  using Tile = typename Cfg::TileQ;
  __shared__ __align__(128) unsigned char smem[Tile::kBytes];
  ptx::wait_for_kernel_in_front();
  const int thread = threadIdx.x;
  const int tiles = gridDim.x / (params.hq * params.seqs.b);
  // The last heads come first: of their sums most are still in L2.
  const int index = gridDim.x - 1 - blockIdx.x;
  const int head = index % params.hq;
  const int row0 = index / params.hq % tiles * Cfg::kBlockM;
  const attn::Sequence seq(params.seqs, index / (params.hq * tiles));
  if (row0 >= seq.sq) return;

  const attn::PaddedRows padded(params, seq.index, head);
  const float* sums = params.dq_accum + (padded.first + row0) * Cfg::kHeadDim;
  typename Cfg::AccQ dq;
  dq.clear();
  for (int copy = 0; copy < params.dq_copies; ++copy) {
    Cfg::OrderQ::load_add(dq, sums + copy * params.dq_accum_copy, thread);
  }
  tile::store_rounded<typename Cfg::T, Tile>(ptx::smem_address(smem), dq,
                                             params.scores.softmax_scale, Cfg::q_row(thread),
                                             Cfg::q_col(thread), thread % 32);
  __syncthreads();
  tile::copy_out<Tile, Cfg::kThreads>(
      attn::rows_of_q(params.dq, params.seqs, seq, head) + row0 * params.dq.row, params.dq.row,
      ptx::smem_address(smem), seq.sq - row0, params.d, thread);
}

}  // namespace flash::common
