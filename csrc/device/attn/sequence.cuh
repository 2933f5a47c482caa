// Where the rows of one sequence stand, and how many there are.
#pragma once

#include "host/flash.h"

namespace flash::attn {

// First row of sequence i, kept within the rows that there are.
__device__ inline int start_of(const int32_t* cu_seqlens, int i, int total) {
  return min(max(cu_seqlens[i], 0), total);
}

// Rows of sequence i: up to where the next starts. Where lengths are given apart, starts may stand
// in any order, and there is room to the end if the next lies before.
__device__ inline int room_of(const int32_t* cu_seqlens, int i, int total, bool any_order) {
  const int start = start_of(cu_seqlens, i, total);
  const int next = start_of(cu_seqlens, i + 1, total);
  return (any_order && next < start ? total : next) - start;
}

// The sequence that has packed row `row`, or -1; for starts that never fall.
__device__ inline int sequence_of_row(const int32_t* cu_seqlens, int b, int row) {
  if (row < cu_seqlens[0] || row >= cu_seqlens[b]) return -1;
  int low = 0;  // cu_seqlens[low] <= row < cu_seqlens[high]
  int high = b;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (cu_seqlens[middle] <= row ? low : high) = middle;
  }
  return low;
}

// What undoes the scaling of a sequence's head.
__device__ inline float factor_of(const Factors& x, int sequence, int head) {
  return x.ptr ? x.ptr[sequence * x.batch + head * x.head] : 1.0f;
}

// One sequence of a call: lengths in use, and first rows.
//
// Lengths and indices come from device memory, unseen by the host; whatever they hold, no row
// outside the operands is reached. A sequence whose row of the cache does not exist has no keys.
struct Sequence {
  int index;
  int cache_row;  // row of the cache, or of the block table
  int sq, sk;
  int skip;         // slots in front of the first key
  int64_t first_q;  // row of a packed q, else 0
  int64_t first_k;  // row of a packed k, else keys to skip

  __device__ Sequence() {}

  __device__ Sequence(const Sequences& all, int index) : index(index), cache_row(index) {
    const int32_t* cu_q = all.cu_seqlens_q;
    const int32_t* cu_k = all.cu_seqlens_k;
    first_q = cu_q ? start_of(cu_q, index, all.total_q) : 0;
    sq = cu_q ? room_of(cu_q, index, all.total_q, all.seqused_q != nullptr) : all.sq;
    if (all.seqused_q) sq = min(sq, all.seqused_q[index]);
    sq = min(max(sq, 0), all.sq);

    const int start_k = cu_k ? start_of(cu_k, index, all.total_k) : 0;
    sk = cu_k ? room_of(cu_k, index, all.total_k, all.seqused_k != nullptr) : all.sk;
    if (all.seqused_k) {
      const int used = all.seqused_k[index] + num_added(all);
      sk = cu_k && !all.block_table ? min(sk, used) : used;
    }
    sk = min(max(sk, 0), all.sk);
    if (all.kv_batch_idx) {
      cache_row = all.kv_batch_idx[index];
      if (cache_row < 0 || cache_row >= all.cache_rows) sk = 0;
    }
    skip = all.leftpad_k ? min(max(all.leftpad_k[index], 0), sk) : 0;
    first_k = (all.block_table ? 0 : start_k) + skip;
    sk -= skip;
  }

 private:
  __device__ int num_added(const Sequences& all) const {
    const int32_t* added = all.cu_seqlens_k_new;
    return added ? added[index + 1] - added[index] : all.sk_new;
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
      : row_stride(x.row),
        page_stride(x.batch),
        table(nullptr),
        first(0),
        page_size(1),
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

// First element of slot `slot` of head `head` in the cache that a sequence appends to; null where
// the cache has no such slot.
__device__ inline uint16_t* cache_slot(const Rows& x, const Sequences& all, int sequence, int slot,
                                       int head) {
  const int row = all.kv_batch_idx ? all.kv_batch_idx[sequence] : sequence;
  if (row < 0 || row >= all.cache_rows || slot < 0 || slot >= all.sk) return nullptr;
  uint16_t* base = static_cast<uint16_t*>(x.ptr) + head * x.head;
  if (!all.block_table) return base + row * x.batch + slot * x.row;
  const int page = all.block_table[row * all.block_table_stride + slot / all.page_size];
  if (page < 0 || page >= all.num_pages) return nullptr;
  return base + page * x.batch + slot % all.page_size * x.row;
}

// Rows of one sequence and head in the backward pass's padded scratch: delta and dq_accum, or the
// statistics, which have another number of rows a head.
struct PaddedRows {
  int64_t first;
  int count;  // up to where the next sequence starts

  __device__ PaddedRows(const BackwardParams& params, int sequence, int head)
      : PaddedRows(params, sequence, head, params.delta_head) {}

  __device__ PaddedRows(const BackwardParams& params, int sequence, int head, int64_t head_rows) {
    const int32_t* starts = params.seqs.cu_seqlens_q;
    const int total = params.seqs.total_q;
    const int begin = starts ? start(starts, sequence, total) : 0;
    const int rows = static_cast<int>(params.delta_head);
    const bool is_last = !starts || sequence + 1 == params.seqs.b;
    count = (is_last ? rows : start(starts, sequence + 1, total)) - begin;
    first = (starts ? begin : sequence * params.delta_batch) + head * head_rows;
  }

  __device__ static int start(const int32_t* cu_seqlens_q, int sequence, int total) {
    return (start_of(cu_seqlens_q, sequence, total) + 128 * sequence) / 128 * 128;
  }
};

}  // namespace flash::attn
