#include "host/workspace.h"

#include "host/fp8.h"
#include "host/launch.h"
#include "host/plan.h"
#include "host/registry.h"
#include "host/text.h"

namespace flash::host {

namespace {

void plan_decode(const Ready& ready, const Device& on, ForwardParams* params,
                 FlashWorkspace* workspace) {
  const Shape& shape = ready.shape;
  workspace->decodes = 1;
  if (params->num_splits != 0)
    params->num_splits = limit_splits(params->num_splits, *params, shape);
  choose_clusters(params, shape, on, ready.kernel->clusters[on.ordinal]);
  // With one part, or one cluster, a head nothing is merged in memory.
  if (params->num_splits == (params->cluster > 0 ? params->cluster : 1)) return;
  const int64_t shares = num_shares(*params, shape, on);
  const int64_t rooms = params->num_splits == 0 ? 2 * shares : shares;
  const int64_t rows = rooms * (params->hq / params->hk) * params->seqs.sq;
  workspace->o_partial = rows * params->dv;
  workspace->lse_partial = 2 * rows;
  workspace->next_tile = 2 * shares;
}

// Whether decode kernels are the ones for a call: there are keys of a cache, or many, and not so
// many rows that Hopper's tiles of queries take less time, where one tile has them all.
bool prefers_decode(const ForwardParams& params, const Device& on, int dtype) {
  constexpr int kManyKeys = 1024, kFewRows = 16;
  const Sequences& seqs = params.seqs;
  const bool has_cache = seqs.seqused_k != nullptr || seqs.block_table != nullptr ||
                         seqs.kv_batch_idx != nullptr || seqs.leftpad_k != nullptr;
  if (seqs.b == 0 || seqs.sq == 0 || !fits_decode(params)) return false;
  if (!has_cache && seqs.sk < kManyKeys) return false;
  if (decode_rows(params) <= kFewRows || dtype == FLASH_E4M3) return true;
  Want want = {FLASH_FORWARD, wider(params.d, params.dv), dtype, on.cc, &params};
  want.num_sms = on.num_sms;
  const Kernel* tiles = find(want);
  if (tiles == nullptr) return true;
  const Shape shape = shape_of(tiles->family, tiles->kind, tiles->head_dim, on.cc);
  return shape.box_m == 0 || choose_heads_of_tile(params, shape) < params.hq / params.hk;
}

// Heads that share tiles and parts of the keys, and the kernel that takes the call so.
bool cut(int dtype, int num_splits, const Device& on, ForwardParams* params, Ready* ready) {
  const Want want = {FLASH_FORWARD, wider(params->d, params->dv), dtype, on.cc, params};
  const Want merging = {FLASH_COMBINE, params->dv, dtype, on.cc};
  params->num_splits = num_splits;
  if (!prepare(want, on, ready)) return false;
  params->heads_of_tile = choose_heads_of_tile(*params, ready->shape);
  params->num_splits = splits_of(num_splits, *params, ready->shape, on);
  if (num_splits == 0 && params->num_splits > 1 && !find(merging)) {
    params->num_splits = num_splits = 1;
  }
  if (params->heads_of_tile == 1 && (params->num_splits > 1) == (num_splits > 1)) return true;
  // Who takes it so may have other tiles.
  if (!prepare(want, on, ready)) return false;
  params->num_splits = splits_of(num_splits, *params, ready->shape, on);
  return true;
}

}  // namespace

bool plan_forward(const Device& on, int dtype, int num_splits, ForwardParams* params,
                  FlashWorkspace* workspace) {
  params->num_splits = num_splits;
  params->heads_of_tile = 1;
  *workspace = {};
  const int head_dim = wider(params->d, params->dv);
  const bool is_fp8 = dtype == FLASH_E4M3;
  const char* missed = is_fp8 ? misses_fp8_forward(*params) : nullptr;
  Ready ready;
  if ((missed != nullptr ? fits_decode(*params) : prefers_decode(*params, on, dtype)) &&
      prepare({FLASH_DECODE, head_dim, dtype, on.cc, params}, on, &ready)) {
    plan_decode(ready, on, params, workspace);
    return true;
  }
  if (missed != nullptr && !fits_decode(*params)) {
    return fail(
        "FP8 keys with %s go with at most %d rows of queries, here %d queries times %d heads",
        missed, most_decode_rows(), params->seqs.sq, params->hq / params->hk);
  }
  if (is_fp8) num_splits = 1;  // they take all keys at once
  if (!cut(dtype, num_splits, on, params, &ready)) return false;
  params->heads_per_section = choose_section(*params, ready.shape, on);
  if (shares_tiles(*params, ready.shape, on)) {
    workspace->next_tile = 2;
    if (wants_line(*params, ready.shape, on)) {
      const int64_t bytes = sizeof(Line) + blocks_in_line(*params, ready.shape) * sizeof(LineBlock);
      workspace->order = bytes / sizeof(float);
    }
  }
  if (params->num_splits > 1) {
    const int64_t rows = int64_t{params->seqs.b} * params->hq * params->seqs.sq;
    workspace->lse_partial = rows * params->num_splits;
    workspace->o_partial = workspace->lse_partial * params->dv;
  }
  return true;
}

bool plan_backward(const Device& on, int dtype, BackwardParams* params, FlashWorkspace* workspace) {
  const int head_dim = wider(params->d, params->dv);
  Ready ready;
  if (!prepare({FLASH_BACKWARD, head_dim, dtype, on.cc, nullptr, params}, on, &ready)) return false;
  const Shape& shape = ready.shape;
  params->dq_cols = ready.kernel->head_dim;
  const bool in_columns = params->deterministic && shape.box_m == 0;
  params->dq_copies = in_columns ? choose_columns(*params, shape, on) : shape.makes_sums;
  params->heads_per_section = choose_section(*params, shape, on);
  params->heads_zeroed = choose_zeroed(*params, shape);
  const int64_t heads = int64_t{params->hq} * (params->seqs.cu_seqlens_q ? 1 : params->seqs.b);
  params->dq_accum_copy = heads * params->delta_head * params->dq_cols;
  *workspace = {};
  workspace->dq_accum = params->dq_accum_copy * params->dq_copies;
  if (shape.box_m > 0) {
    // A row's statistics are two floats, and those of a head begin at a multiple of 16 bytes.
    params->statistics_head = ceil_div(params->delta_head, 4) * 4;
    workspace->statistics = 2 * heads * params->statistics_head;
    params->turn_rows = shape.block_m;
    params->turn_keys = shape.block_n;
    // Where there may be blocks of no queries, each block of dQ has its CTA.
    workspace->next_tile = shape.makes_sums || !has_lengths(params->seqs) ? 4 : 0;
    if (shape.makes_sums) {
      const int64_t turns = 2 * (heads * params->delta_head / shape.box_m + 1);
      workspace->turns = params->heads_zeroed == 0 ? turns : 0;
      workspace->finished = 2 * int64_t{params->seqs.b} * params->hk;
      if (has_lengths(params->seqs)) workspace->order = 2 * (params->seqs.b + 1);
    }
  }
  return true;
}

}  // namespace flash::host
