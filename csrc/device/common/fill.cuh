// Gives rows that no sequence uses their values: zero, and +inf as log-sum-exp. For a forward call
// that wants it, finds the line of its sequences too.
//
// The other kernels write the rows in use only. These are behind seqused, behind the last sequence
// of a packed operand, or beyond the longest sequence that the caller promised. A warp looks at 32
// rows, one a lane, and then zeroes those in need of it together. Bound by the search where there
// are none, else by memory.
#pragma once

#include "attn/line.cuh"
#include "attn/sequence.cuh"
#include "attn/softmax.cuh"
#include "common/config.h"
#include "common/order.cuh"
#include "ptx/memory.cuh"

namespace flash::common {

// One row of q or k among all that there are.
struct AnyRow {
  int64_t batch;  // 0 where packed
  int64_t row;    // counted from the first of a packed operand, else of the batch entry

  __device__ AnyRow(const FillParams& params, int64_t at) {
    const int rows = params.is_keys ? params.seqs.sk : params.seqs.sq;
    const bool is_packed = cu_seqlens(params) != nullptr;
    batch = is_packed ? 0 : at / rows;
    row = is_packed ? at : at % rows;
  }

  __device__ static const int32_t* cu_seqlens(const FillParams& params) {
    return params.is_keys ? params.seqs.cu_seqlens_k : params.seqs.cu_seqlens_q;
  }

  __device__ bool is_of(const FillParams& params, int sequence) const {
    const attn::Sequence seq(params.seqs, sequence);
    const int64_t at = row - (params.is_keys ? seq.first_k : seq.first_q);
    return at >= 0 && at < (params.is_keys ? seq.sk : seq.sq);
  }

  __device__ bool is_used(const FillParams& params) const {
    const int32_t* starts = cu_seqlens(params);
    const int b = params.seqs.b;
    if (!starts) return is_of(params, static_cast<int>(batch));
    if (!(params.is_keys ? params.seqs.seqused_k : params.seqs.seqused_q)) {
      const int sequence = attn::sequence_of_row(starts, b, static_cast<int>(row));
      return sequence >= 0 && is_of(params, sequence);
    }
    // Starts in any order.
    bool found = false;
    for (int sequence = 0; sequence < b && !found; ++sequence) found = is_of(params, sequence);
    return found;
  }
};

__device__ inline void fill_row(const FillParams& params, const AnyRow& at, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Rows& x = params.x[i];
    if (!x.ptr) continue;
    uint16_t* to = static_cast<uint16_t*>(x.ptr) + at.batch * x.batch + at.row * x.row;
    const int chunks = params.cols[i] / 8;
    for (int chunk = lane; chunk < chunks * params.heads; chunk += 32) {
      *reinterpret_cast<uint4*>(to + chunk / chunks * x.head + chunk % chunks * 8) =
          make_uint4(0, 0, 0, 0);
    }
  }
  if (!params.lse) return;
  float* lse = params.lse + at.batch * params.lse_batch + at.row;
  for (int head = lane; head < params.heads; head += 32) {
    lse[head * params.lse_head] = attn::infinity();
  }
}

// A warp's work: the blocks of a sequence in ForwardParams::line, or the line itself.
__device__ inline void find_line(const FillParams& params, int index) {
  const Sequences& seqs = params.seqs;
  const int lane = threadIdx.x % 32;
  const auto blocks_of = [&](const attn::Sequence& seq) -> uint32_t {
    return (seq.sq + params.block_queries - 1) / params.block_queries;
  };
  const auto has_several = [&](const attn::Sequence& seq) { return seq.sq > params.block_queries; };
  const uint32_t room = params.line_blocks;
  if (index < seqs.b) {
    const attn::Sequence own(seqs, index);
    const uint32_t first = count(seqs, blocks_of, [&](const attn::Sequence& seq) {
                             if (has_several(seq) != has_several(own)) return has_several(seq);
                             return seq.sk > own.sk || (seq.sk == own.sk && seq.index < index);
                           }).blocks;
    const uint32_t end = min(first + blocks_of(own), room);
    for (uint32_t i = first + lane; i < end; i += 32) {
      attn::blocks_of(params.line)[i] = {index, first};
    }
  } else if (index == seqs.b) {
    const auto any = [](const attn::Sequence&) { return true; };
    const uint32_t all = min(count(seqs, blocks_of, any).blocks, room);
    const uint32_t several = min(count(seqs, blocks_of, has_several).blocks, room);
    if (lane != 0) return;
    // Rounded up: so of as many turns as there are blocks, as many are of lone ones.
    const uint64_t lone = all - several;
    const bool is_mixed = lone > 0 && several > 0;
    const uint64_t part = is_mixed ? ((lone << 32) + all - 1) / all : 0;
    *params.line = {all, several, static_cast<uint32_t>(part)};
  }
}

// Grid: where the line is wanted all sequences and one more, a warp each; then all rows,
// kFillThreads a CTA.
__device__ inline void fill(const FillParams& params) {
  ptx::let_kernel_behind_begin();
  const Sequences& seqs = params.seqs;
  int block = blockIdx.x;
  if (params.line) {
    constexpr int kWarps = kFillThreads / 32;
    if (block * kWarps <= seqs.b) return find_line(params, block * kWarps + threadIdx.x / 32);
    block -= seqs.b / kWarps + 1;
  }
  const bool is_packed = AnyRow::cu_seqlens(params) != nullptr;
  const int64_t packed_rows = params.is_keys ? seqs.total_k : seqs.total_q;
  const int64_t dense_rows = static_cast<int64_t>(seqs.b) * (params.is_keys ? seqs.sk : seqs.sq);
  const int64_t count = is_packed ? packed_rows : dense_rows;
  const int lane = threadIdx.x % 32;
  const int64_t mine = static_cast<int64_t>(block) * kFillThreads + threadIdx.x;
  const bool is_unused = mine < count && !AnyRow(params, mine).is_used(params);
  for (uint32_t rows = __ballot_sync(0xffffffffu, is_unused); rows != 0; rows &= rows - 1) {
    fill_row(params, AnyRow(params, mine - lane + __ffs(rows) - 1), lane);
  }
}

}  // namespace flash::common
