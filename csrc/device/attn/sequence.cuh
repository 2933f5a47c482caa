// Where the rows of one sequence stand, and how many there are.
#pragma once

#include "host/flash.h"

namespace flash::attn {

// One sequence of a call: lengths in use, and first rows.
struct Sequence {
  int index;
  int cache_row;  // row of the cache, or of the block table
  int sq, sk;
  int64_t first_q;  // row of a packed q, else 0
  int64_t first_k;  // row of a packed k, else keys to skip

  __device__ Sequence(const Sequences& all, int index) : index(index) {
    cache_row = all.kv_batch_idx ? all.kv_batch_idx[index] : index;
    first_q = all.cu_seqlens_q ? all.cu_seqlens_q[index] : 0;
    sq = all.cu_seqlens_q ? all.cu_seqlens_q[index + 1] - static_cast<int>(first_q) : all.sq;
    if (all.seqused_q) sq = all.seqused_q[index];
    const int start_k = all.cu_seqlens_k ? all.cu_seqlens_k[index] : 0;
    sk = all.cu_seqlens_k ? all.cu_seqlens_k[index + 1] - start_k : all.sk;
    if (all.seqused_k) {
      const int32_t* added = all.cu_seqlens_k_new;
      sk = all.seqused_k[index] + (added ? added[index + 1] - added[index] : all.sk_new);
    }
    // Lengths come from device memory, unseen by the host: they never reach past the buffers.
    sq = min(max(sq, 0), all.sq);
    sk = min(max(sk, 0), all.sk);
    const int skip = all.leftpad_k ? min(max(all.leftpad_k[index], 0), sk) : 0;
    first_k = (all.block_table ? 0 : start_k) + skip;
    sk -= skip;
  }
};

// First element of the sequence's row 0 of head `head`, for an operand with q's rows.
__device__ inline uint16_t* rows_of_q(const Rows& x, const Sequences& all, const Sequence& seq,
                                      int head) {
  const int64_t batch = all.cu_seqlens_q ? 0 : seq.index * x.batch;
  return static_cast<uint16_t*>(x.ptr) + batch + seq.first_q * x.row + head * x.head;
}

// The same for an operand with k's rows, where the call has neither pages nor a cache.
__device__ inline uint16_t* rows_of_k(const Rows& x, const Sequences& all, const Sequence& seq,
                                      int head) {
  const int64_t batch = all.cu_seqlens_k ? 0 : seq.index * x.batch;
  return static_cast<uint16_t*>(x.ptr) + batch + seq.first_k * x.row + head * x.head;
}

// Row r of keys, of head `head`: contiguous rows, or pages looked up in the block table.
struct KeyRows {
  const uint16_t* base;
  int64_t row_stride;
  int64_t page_stride;
  const int32_t* table;  // null: contiguous
  int first;
  int page_size;
  int num_pages;

  __device__ KeyRows(const Rows& x, const Sequences& all, const Sequence& seq, int head)
      : row_stride(x.row), page_stride(x.batch), table(nullptr), first(0), page_size(1),
        num_pages(1) {
    base = static_cast<const uint16_t*>(x.ptr) + head * x.head;
    if (all.block_table) {
      table = all.block_table + seq.cache_row * all.block_table_stride;
      first = static_cast<int>(seq.first_k);
      page_size = all.page_size;
      num_pages = all.num_pages;
    } else {
      base += (all.cu_seqlens_k ? 0 : seq.cache_row * x.batch) + seq.first_k * x.row;
    }
  }

  // Row r of pages.
  __device__ const uint16_t* paged_row(int r, int num_rows) const {
    // Rows behind the end are not read, but their table entries would be.
    const int key = first + min(r, num_rows - 1);
    // An index outside the cache is clamped: nothing outside it is ever read.
    const int page = min(max(table[key / page_size], 0), num_pages - 1);
    return base + page * page_stride + key % page_size * row_stride;
  }
};

// Rows of one sequence and head in the backward pass's padded scratch, delta and dq_accum.
struct PaddedRows {
  int64_t first;
  int count;  // up to where the next sequence starts

  __device__ PaddedRows(const BackwardParams& params, int sequence, int head) {
    const int32_t* starts = params.seqs.cu_seqlens_q;
    const int begin = starts ? start(starts, sequence) : 0;
    const int rows = static_cast<int>(params.delta_head);
    count = (starts && sequence + 1 < params.seqs.b ? start(starts, sequence + 1) : rows) - begin;
    first = (starts ? begin : sequence * params.delta_batch) + head * params.delta_head;
  }

  __device__ static int start(const int32_t* cu_seqlens_q, int sequence) {
    return (cu_seqlens_q[sequence] + 128 * sequence) / 128 * 128;
  }
};

}  // namespace flash::attn
