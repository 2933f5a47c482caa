// The whole contract between host and device: parameter structs, passed by value to the kernels.
//
// Plain data with fixed-width fields; NVRTC, nvcc and every host compiler must lay them out alike.
// Strides count elements. A null pointer means that the call does not have the thing.
//
// b batch, sq / sk query and key rows, hq / hk query and key-value heads, d / dv head dims.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
#else
#include <stdint.h>
#endif

// e4m3 is for forward calls alone. Their o is bf16 where q is e4m3, else like q.
enum FlashDtype { FLASH_FP16, FLASH_BF16, FLASH_E4M3, FLASH_NUM_DTYPES };

namespace flash {

constexpr int32_t kWidest = 256;  // head dim that all kernels but those of latent attention take

// Rows of one operand: element (i, r, h, x) stands at ptr + i * batch + r * row + h * head + x.
// In a packed operand (cu_seqlens given) `batch` is unused: r counts from the sequence's first row.
struct Rows {
  void* ptr;
  int64_t batch;
  int64_t row;
  int64_t head;
};

// Rows of the parts of a split call, with a stride from part to part.
struct Parts {
  const float* ptr;
  int64_t split;
  int64_t batch;
  int64_t row;
  int64_t head;
};

// Which rows belong to which sequence.
struct Sequences {
  const int32_t* cu_seqlens_q;  // [b + 1]
  const int32_t* cu_seqlens_k;  // [b + 1]
  const int32_t* seqused_q;     // [b] rows in use, from the sequence's first
  const int32_t* seqused_k;     // [b]
  const int32_t* leftpad_k;     // [b] keys to skip
  const int32_t* kv_batch_idx;  // [b] row of the cache, or of block_table
  // [b, pages of a sequence]; k and v are then [num_pages, page_size, hk, d]
  const int32_t* block_table;
  int64_t block_table_stride;
  int32_t page_size;
  int32_t num_pages;
  int32_t b;
  int32_t sq;  // rows of a dense q, else the longest sequence
  int32_t sk;
  int32_t total_q;     // rows of a packed q
  int32_t total_k;     // rows of a packed k
  int32_t cache_rows;  // rows that kv_batch_idx chooses from
  // Keys just appended behind seqused_k: lengths of sequences, or one length for all.
  const int32_t* cu_seqlens_k_new;  // [b + 1]
  int32_t sk_new;
};

// How a score becomes a probability.
struct Scores {
  float softmax_scale;
  float softcap;        // 0: none
  int32_t window_left;  // -1: unbounded
  int32_t window_right;
  int32_t attention_chunk;    // 0: none
  const float* alibi_slopes;  // [hq], or [b, hq]
  int64_t alibi_batch_stride;
  const int64_t* rng_state;  // [2] seed, offset; null: no dropout
  float keep_scale;          // 1 / (1 - dropout_p)
  uint32_t keep_threshold;   // keep iff byte <= threshold
};

// Factors of sequences and key-value heads: that of (i, h) stands at ptr + i * batch + h * head.
struct Factors {
  const float* ptr;  // null: all are 1
  int64_t batch;
  int64_t head;
};

// Blocks of rows of all sequences, in the order in which CTAs take their tiles: one for each head.
// Sequences of one block stand behind all others.
struct alignas(8) Line {
  uint32_t blocks;
  uint32_t of_several;    // blocks of sequences that have several
  uint32_t part_of_lone;  // what part of all the others are, in 2^-32; 0 if that is none, or all
};
struct LineBlock {
  int32_t sequence;
  uint32_t first;  // the sequence's first block
};

struct ForwardParams {
  Rows q, k, v, o;
  float* lse;  // (i, h, r) at i * lse_batch + h * lse_head + r
  int64_t lse_batch;
  int64_t lse_head;
  Sequences seqs;
  Scores scores;
  int32_t hq, hk;
  int32_t d, dv;
  void* s_dmask;  // [b, hq, s_dmask_rows, s_dmask_cols] of q's dtype, or null
  int32_t s_dmask_rows;
  int32_t s_dmask_cols;
  // Split-KV: with num_splits > 1, unnormalised parts go to o_partial [split, b, hq, sq, dv] and
  // lse_partial [split, b, hq, sq], float, and the combine kernel merges them.
  float* o_partial;
  float* lse_partial;
  int32_t num_splits;
  int32_t cluster;  // CTAs of a decode call that merge in shared memory; 0: none do
  // Order of tiles: heads that share K and V in L2 run together, long rows first.
  int32_t heads_per_section;
  int32_t heads_of_tile;  // query heads of a group whose rows share a tile; 1: none do
  // CTAs take tile after tile by this counter (attn/counter.cuh); null: each tile has its CTA.
  uint64_t* next_tile;
  // The line of sequences that have lengths, most keys first, and behind it its blocks, as the
  // kernel that fills unused rows finds them. Null: sequences come in the caller's order.
  Line* line;
  int32_t sm_margin;                        // multiprocessors that such CTAs leave to other kernels
  int32_t q_dtype;                          // a FlashDtype; k and v of a decode call may be e4m3
  Factors q_descale, k_descale, v_descale;  // of 8-bit operands
  // A second query, against v: scores are softmax_scale (q k^T + qv v^T). Rows of q, dv columns.
  Rows qv;
  int32_t has_qv;  // known when a call is planned, before any pointer is
};

// A tensor as the tensor memory accelerator sees it: the driver's CUtensorMap. Ours have four
// dimensions: columns, rows, heads, batch (1 of a packed operand).
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// A forward call whose operands come and go by that accelerator.
struct TmaForwardParams {
  TensorMap q, k, v, o;
  ForwardParams call;
  float scale_log2;      // softmax_scale to logarithms of base 2
  uint64_t call_number;  // no other call's; with kCounterBits bits free
  uint32_t last_section;
  uint32_t tile_heads;      // tiles with the same rows
  uint32_t row_blocks;      // tiles of one head that the longest sequence has
  int32_t tile_queries;     // queries of a tile, or of those of a pair together
  int32_t own_queries;      // of them a consumer's, whose 64 rows are those of heads_of_tile heads
  uint32_t inverse_of_own;  // a row times this, over 2^16, is which of those heads it is
};

// The same of V that is wide beside Q and K, with a second query or without.
struct TmaLatentParams {
  TmaForwardParams all;
  TensorMap qv;
};

constexpr int kCounterBits = 24;

// Of sums that nobody zeroes.
enum SumState : int32_t { kNothingIsThere, kSomeoneStores, kSumsAreThere };

struct BackwardParams {
  Rows q, k, v, o, dout;
  Rows dq, dk, dv_grad;
  const float* lse;
  int64_t lse_batch;
  int64_t lse_head;
  // delta = rowsum(dout * o), the published softmax_d: (i, h, r) at i * delta_batch +
  // h * delta_head + r, where delta_head is the number of rows of one head, rounded up. In a packed
  // call delta_batch is unused and sequence i starts at row 128 * ((cu_seqlens_q[i] + 128 i) /
  // 128).
  float* delta;
  int64_t delta_batch;
  int64_t delta_head;
  Sequences seqs;
  Scores scores;
  int32_t hq, hk;
  int32_t d, dv;
  // Sums of dQ, rows as in delta, of dq_cols (the kernel's head dim) floats each; within a tile of
  // rows the order is the kernel's own. The delta kernel zeroes all copies of heads_zeroed heads.
  float* dq_accum;
  int64_t dq_accum_copy;
  int32_t dq_cols;
  int32_t dq_copies;
  // Columns of CTAs: 0: a CTA for each block of keys, all add to one copy. Otherwise dq_copies:
  // column c takes blocks c, c + dq_copies, ... and adds to copy c, so that sums have one order.
  int32_t deterministic;
  int32_t heads_per_section;  // of key-value heads, as in ForwardParams
  // Where given, the delta kernel leaves what the main one needs of each row: tiles of 64 rows, as
  // delta has them with statistics_head rows of one head, are 64 lse in base 2 (+inf for rows that
  // are not there) and then 64 times -delta.
  float* statistics;
  int64_t statistics_head;
  // Where given, who comes first stores sums, and others add to them: two states for each 64 rows
  // of dq_accum, of which the delta kernel writes the first. SumState; or, in a deterministic call,
  // which block of turn_keys keys is next, from the last that the turn_rows queries about there see
  // down to the first: ~j is block j where it is the first to come.
  int32_t* turns;
  int32_t turn_rows, turn_keys;
  // CTAs of the main kernel take block after block of keys by this counter, and those of the kernel
  // behind it tiles or blocks of dQ by the next; null: each block has its CTA.
  uint64_t* next_block;
  // [b, hk] blocks of turn_keys keys whose shares of dQ are in the sums, counted by each who adds.
  // The delta kernel clears these, those below and the counters above.
  int32_t* finished;
  // [b, hk] blocks that have zeroed their part of a section's sums, where its first head stands.
  int32_t* zeroed;
  // [b + 1, 2] where sequences have lengths: those of most queries first. Of each its index, and
  // the blocks of turn_keys keys of all heads in front of it; then those of all. The delta kernel
  // fills it in.
  uint32_t* order;
  // Of all sequences' key-value heads those that the delta kernel zeroes sums for: all; or those of
  // the first section, and the blocks of a section do it for the next; or none, where there are
  // turns.
  int32_t heads_zeroed;
  int32_t sm_margin;  // as in ForwardParams
};

// A backward call whose operands come and go by the tensor memory accelerator.
struct TmaBackwardParams {
  TensorMap q, k, v, dout, dk, dv;
  BackwardParams call;
  float scale_log2;  // softmax_scale to logarithms of base 2
  float lse_factor;  // -1 / scale_log2
};

struct CombineParams {
  Parts o_partial;
  Parts lse_partial;
  Rows o;  // of the kernel's dtype, or of float
  int32_t o_is_float;
  float* lse;  // (i, h, r) at i * lse_batch + h * lse_head + r * lse_row
  int64_t lse_batch;
  int64_t lse_head;
  int64_t lse_row;
  Sequences seqs;  // queries only
  int32_t num_splits;
  int32_t hq, dv;
  int32_t shares_rows;  // the warps of a CTA share a row; else each has one
};

// New keys and values for a cache, and how they and the queries are rotated.
struct NewRows {
  Rows k, v;                  // null: there are none
  const int32_t* cu_seqlens;  // [b + 1]; null: `count` rows for each sequence
  int32_t count;              // of a sequence, or of all sequences if packed
  int32_t rotary_dim;
  int32_t rotary_rows;
  int32_t rotary_interleaved;
  int32_t queries_stay;    // all queries are rotated as the first new key
  const void* rotary_cos;  // [rotary_rows, rotary_dim / 2] of q's dtype; null: nothing is rotated
  const void* rotary_sin;
  const int32_t* rotary_seqlens;  // [b] position of the first new key; null: seqused_k
};

struct AppendParams {
  NewRows added;
  Rows k, v;
  Rows q, q_rotated;  // null: queries stay as they are
  Sequences seqs;     // seqused_k: lengths before the append
  int32_t hq, hk;
  int32_t d, dv;
};

// A forward call of few queries, which appends to its cache on the way.
//
// A CTA has a part of the keys of one sequence and head, or an equal share of all blocks of keys,
// whose first and last sequence may be cut. What it has of those that are cut goes to o_partial
// [2 shares, rows, dv] and lse_partial [2 shares, rows, 2] (largest score in base 2, and sum),
// float, where rows is hq / hk * sq, and whoever comes last merges. With num_splits > 0 each
// sequence is cut into so many, and a share is one of them. What CTAs of a cluster have of one
// sequence and head is merged there first.
//
// Operands of 8 bits are rows of pairs: their strides count 16 bits, head dims elements as always.
struct DecodeParams {
  ForwardParams call;  // next_tile: a counter for each share (attn/counter.cuh)
  NewRows added;
  uint64_t call_number;
  uint32_t group;          // hq / hk
  uint32_t group_inverse;  // x / group is x * group_inverse >> 16 for the rows of a tile
};

// Rows that no sequence uses: behind seqused, or behind the last sequence of a packed operand.
struct FillParams {
  Rows x[2];        // become zero; null: not there
  int32_t cols[2];  // of x, multiples of 8
  float* lse;       // becomes +inf, as in ForwardParams; null: not there
  int64_t lse_batch;
  int64_t lse_head;
  Sequences seqs;
  int32_t is_keys;  // x has k's rows, else q's
  int32_t heads;
  Line* line;             // ForwardParams::line, to be found too; null: nobody asks for it
  int32_t line_blocks;    // that there is room for
  int32_t block_queries;  // of a block
};

}  // namespace flash
