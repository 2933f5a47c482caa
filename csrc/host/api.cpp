#include "host/api.h"

#include <atomic>
#include <type_traits>

#include "device/common/config.h"
#include "device/sm90/config.h"
#include "host/driver.h"
#include "host/fp8.h"
#include "host/launch.h"
#include "host/numbers.h"
#include "host/plan.h"
#include "host/registry.h"
#include "host/tensor_maps.h"
#include "host/text.h"
#include "host/workspace.h"

using namespace flash;        // NOLINT: the C ABI stands in no namespace
using namespace flash::host;  // NOLINT

namespace {

// One call on one device: kernels are found by the call's head dim and dtype.
struct Call {
  const Device& on;
  void* stream;
  int dtype;
  int head_dim;

  bool prepare(int kind, Ready* ready, const ForwardParams* forward = nullptr) const {
    return flash::host::prepare({kind, head_dim, dtype, on.cc, forward}, on, ready);
  }
  bool prepare_backward(Ready* ready, const BackwardParams& params) const {
    return flash::host::prepare({FLASH_BACKWARD, head_dim, dtype, on.cc, nullptr, &params}, on,
                                ready);
  }
  // What leaves dQ, of the same family as the kernel of dK and dV.
  bool prepare_dq(Ready* ready, const Ready& main) const {
    const int kind = main.shape.makes_sums ? FLASH_CONVERT : FLASH_DQ;
    const int family = main.kernel->family;
    return flash::host::prepare({kind, head_dim, dtype, on.cc, nullptr, nullptr, family}, on,
                                ready);
  }

  bool run(const Ready& ready, int64_t num_ctas, const void* params, int cluster = 0) const {
    return launch(ready, on, stream, num_ctas, params, cluster);
  }
};

// Runs a kernel whose CTAs take rows, `block_m` each.
bool run_rows(const Call& call, int kind, int64_t rows, const void* params) {
  Ready ready;
  return call.prepare(kind, &ready) && call.run(ready, ceil_div(rows, ready.shape.block_m), params);
}

bool combine(const Call& call, const CombineParams& given) {
  const int64_t rows = int64_t{given.seqs.b} * given.hq * given.seqs.sq;
  CombineParams params = given;
  params.shares_rows = shares_rows(rows, given.num_splits, call.on);
  // Of a row.
  const int64_t warps = ceil_div(params.dv, common::kCombineColumns) *
                        (params.shares_rows ? common::kCombineWarps : 1);
  return run_rows(call, FLASH_COMBINE, rows * warps, &params);
}

CombineParams combine_params(const ForwardParams& params) {
  const int64_t head = params.seqs.sq;
  const int64_t batch = head * params.hq;
  const int64_t split = batch * params.seqs.b;
  const int64_t dv = params.dv;
  CombineParams merged = {};
  merged.o_partial = {params.o_partial, split * dv, batch * dv, dv, head * dv};
  merged.lse_partial = {params.lse_partial, split, batch, 1, head};
  merged.o = params.o;
  merged.lse = params.lse;
  merged.lse_batch = params.lse_batch;
  merged.lse_head = params.lse_head;
  merged.lse_row = 1;
  merged.seqs.cu_seqlens_q = params.seqs.cu_seqlens_q;
  merged.seqs.seqused_q = params.seqs.seqused_q;
  merged.seqs.total_q = params.seqs.total_q;
  merged.seqs.b = params.seqs.b;
  merged.seqs.sq = params.seqs.sq;
  merged.num_splits = params.num_splits;
  merged.hq = params.hq;
  merged.dv = params.dv;
  return merged;
}

// Whether some rows of q may belong to no sequence.
bool has_unused_q(const Sequences& seqs) {
  return seqs.cu_seqlens_q != nullptr || seqs.seqused_q != nullptr;
}

bool has_unused_k(const Sequences& seqs) {
  return seqs.cu_seqlens_k != nullptr || seqs.seqused_k != nullptr;
}

// O of 8-bit operands is bf16.
Call for_output(const Call& call) {
  return {call.on, call.stream, call.dtype == FLASH_E4M3 ? FLASH_BF16 : call.dtype, call.head_dim};
}

bool fill(const Call& call, const FillParams& params) {
  const Sequences& seqs = params.seqs;
  int64_t rows = int64_t{seqs.b} * (params.is_keys ? seqs.sk : seqs.sq);
  if (params.is_keys && seqs.cu_seqlens_k != nullptr) rows = seqs.total_k;
  if (!params.is_keys && seqs.cu_seqlens_q != nullptr) rows = seqs.total_q;
  if (params.x[0].ptr == nullptr) rows = 0;
  Ready ready;
  if (!call.prepare(FLASH_FILL, &ready)) return false;
  int64_t ctas = ceil_div(rows, ready.shape.block_m);
  if (params.line != nullptr) ctas += seqs.b / (ready.shape.threads / 32) + 1;
  return call.run(ready, ctas, &params);
}

// Rows of a tensor that belong to no sequence: those of q, unless `is_keys` is set.
FillParams unused_rows_of(const Sequences& seqs, const Rows& x, int cols, int heads) {
  FillParams filled = {};
  filled.x[0] = x;
  filled.cols[0] = cols;
  filled.seqs = seqs;
  filled.heads = heads;
  return filled;
}

FillParams unused_rows_of(const ForwardParams& params) {
  const Rows o = has_unused_q(params.seqs) ? params.o : Rows{};
  FillParams filled = unused_rows_of(params.seqs, o, params.dv, params.hq);
  filled.lse = params.lse;
  filled.lse_batch = params.lse_batch;
  filled.lse_head = params.lse_head;
  return filled;
}

FillParams unused_queries_of(const BackwardParams& params) {
  return unused_rows_of(params.seqs, params.dq, params.d, params.hq);
}

FillParams unused_keys_of(const BackwardParams& params) {
  FillParams filled = unused_rows_of(params.seqs, params.dk, params.d, params.hk);
  filled.is_keys = 1;
  filled.x[1] = params.dv_grad;
  filled.cols[1] = params.dv;
  return filled;
}

bool s_dmask(const Call& call, const ForwardParams& params) {
  Ready ready;
  const int64_t heads = int64_t{params.hq} * params.seqs.b;
  return call.prepare(FLASH_S_DMASK, &ready) &&
         call.run(ready, ceil_div(params.seqs.sq, ready.shape.block_m) * heads, &params);
}

// A number that no other of 2^40 calls has, and that memory hardly holds by chance.
uint64_t next_call_number() {
  static std::atomic<uint64_t> calls;
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;
  return (calls.fetch_add(1, std::memory_order_relaxed) + 1) * kOdd << kCounterBits >> kCounterBits;
}

// For the rows of a tile, x / divisor is x * inverse >> 16.
uint32_t inverse_of(uint32_t divisor) { return 65536 / divisor + 1; }

// Values of rows that no sequence uses, and the line of sequences where the call has one.
bool fill_for_forward(const Call& call, const Ready& ready, const ForwardParams& params) {
  if (!has_unused_q(params.seqs) && params.line == nullptr) return true;
  FillParams filled = unused_rows_of(params);
  filled.line = params.line;
  filled.line_blocks = blocks_in_line(params, ready.shape);
  filled.block_queries = queries_of_tile(params, ready.shape);
  return fill(for_output(call), filled);
}

bool run_forward(const Call& call, const Ready& ready, const ForwardParams& params) {
  const int64_t ctas = num_ctas(params, ready.shape, call.on);
  if (ctas == 0) return true;
  if (ready.shape.box_m == 0) return call.run(ready, ctas, &params);
  TmaLatentParams made;  // of which other kernels take the first part
  TmaForwardParams& with_maps = made.all;
  const bool in_pairs = is_paired(params, ready.shape, call.on);
  const bool has_maps =
      is_latent(params) ? make_tma_params(params, ready.shape, call.dtype, &made)
                        : make_tma_params(params, ready.shape, call.dtype, in_pairs, &with_maps);
  if (!has_maps) return false;
  with_maps.call_number = next_call_number();
  with_maps.last_section = last_section(params, ready.shape, call.on);
  // A pair has more of one or the other.
  const bool pairs_heads = in_pairs && is_latent(params);
  with_maps.tile_heads = params.hq / params.heads_of_tile / (pairs_heads ? 2 : 1);
  with_maps.tile_queries =
      queries_of_tile(params, ready.shape) * (in_pairs && !pairs_heads ? 2 : 1);
  with_maps.row_blocks = ceil_div(params.seqs.sq, with_maps.tile_queries);
  with_maps.own_queries = ready.shape.box_m / params.heads_of_tile;
  with_maps.inverse_of_own = inverse_of(with_maps.own_queries);
  return call.run(ready, ctas, &made, in_pairs ? 2 : 0);
}

bool forward(const Call& call, const ForwardParams& params) {
  Ready ready;
  return call.prepare(FLASH_FORWARD, &ready, &params) && fill_for_forward(call, ready, params) &&
         run_forward(call, ready, params) &&
         (params.num_splits <= 1 || combine(call, combine_params(params))) &&
         (params.s_dmask == nullptr || s_dmask(call, params));
}

bool decode(const Call& call, const DecodeParams& given) {
  DecodeParams params = call.dtype == FLASH_E4M3 ? in_pairs(given) : given;
  params.call_number = next_call_number();
  params.group = static_cast<uint32_t>(params.call.hq / params.call.hk);
  params.group_inverse = inverse_of(params.group);
  Ready ready;
  return call.prepare(FLASH_DECODE, &ready, &params.call) &&
         call.run(ready, num_shares(params.call, ready.shape, call.on), &params,
                  params.call.cluster) &&
         (!has_unused_q(params.call.seqs) || fill(for_output(call), unused_rows_of(params.call)));
}

// The kernel of dK and dV, and the one that leaves dQ.
bool run_gradients(const Call& call, const Ready& main, const Ready& dq,
                   const BackwardParams& params) {
  const int64_t ctas = num_ctas(params, main.shape, call.on);
  const int64_t ctas_of_dq = num_ctas_of_dq(params, dq.shape, call.on);
  TmaBackwardParams with_maps;
  if (main.shape.box_m == 0) {
    if (!call.run(main, ctas, &params)) return false;
  } else if (!make_tma_params(params, main.shape, call.dtype, &with_maps) ||
             !call.run(main, ctas, &with_maps)) {
    return false;
  }
  // A kernel that computes dQ copies the same boxes.
  return main.shape.makes_sums ? call.run(dq, ctas_of_dq, &params)
                               : call.run(dq, ctas_of_dq, &with_maps);
}

bool backward(const Call& call, const BackwardParams& params) {
  Ready delta;
  Ready main;
  Ready dq;
  // All three are there before the first one runs.
  if (!call.prepare(FLASH_DELTA, &delta) || !call.prepare_backward(&main, params) ||
      !call.prepare_dq(&dq, main)) {
    return false;
  }
  const int64_t heads = int64_t{params.hq} * params.seqs.b;
  return call.run(delta, ceil_div(params.seqs.sq, delta.shape.block_m) * heads, &params) &&
         run_gradients(call, main, dq, params) &&
         (!has_unused_q(params.seqs) || fill(call, unused_queries_of(params))) &&
         (!has_unused_k(params.seqs) || fill(call, unused_keys_of(params)));
}

bool append(const Call& call, const AppendParams& given) {
  const AppendParams params = call.dtype == FLASH_E4M3 ? in_pairs(given) : given;
  // New keys and values of each key-value head, then queries of each query head.
  const Sequences& seqs = params.seqs;
  const int64_t rows_k = params.added.cu_seqlens == nullptr ? int64_t{seqs.b} * params.added.count
                                                            : params.added.count;
  int64_t rows_q = 0;
  if (params.q_rotated.ptr != nullptr) {
    rows_q = seqs.cu_seqlens_q == nullptr ? int64_t{seqs.b} * seqs.sq : seqs.total_q;
  }
  return run_rows(for_output(call), FLASH_APPEND, rows_k * params.hk + rows_q * params.hq, &params);
}

// Runs one of the above in the device's context.
template <class Params>
int enter(int ordinal, void* stream, int dtype, const Params& params, int head_dim,
          bool (*run)(const Call&, const Params&)) {
  const Device* on = device(ordinal);
  if (on == nullptr) return 0;
  const ContextScope scope(*on);
  return scope.ok() && run({*on, stream, dtype, head_dim}, params);
}

constexpr int kRows = 4096;

// A call of usual sizes with such features.
template <class Params>
void make_usual(Params* params, int head_dim, int features, int num_queries) {
  alignas(16) static int64_t memory[2];  // looked at by nobody
  const int d = (head_dim + 15) / 16 * 16;
  params->q = params->k = params->v = params->o = {memory, int64_t{kRows} * d, d, d};
  params->seqs.b = params->seqs.cache_rows = params->hq = params->hk = 1;
  params->seqs.sq = num_queries;
  params->seqs.sk = kRows;
  params->d = params->dv = d;
  if constexpr (std::is_same_v<Params, ForwardParams>) {
    params->has_qv = (features & FLASH_QV) != 0;
    if (is_latent(*params) && d > sm90::LatentTile::kHeadDim) {
      params->d = sm90::LatentTile::kHeadDim;
    }
  }
  params->scores.softmax_scale = 1.0f;
  params->scores.window_left = -1;
  params->scores.window_right = (features & FLASH_MASK) != 0 ? 0 : -1;
  params->scores.softcap = (features & FLASH_SCORED) != 0 ? 1.0f : 0.0f;
  if ((features & FLASH_DROPOUT) != 0) params->scores.rng_state = memory;
  if ((features & FLASH_PAGES) != 0) {
    params->seqs.block_table = reinterpret_cast<const int32_t*>(memory);
    params->seqs.page_size = params->seqs.num_pages = 16;
  }
}

}  // namespace

const char* flash_last_error() { return last_error().data; }

int flash_open(const char* kernel_folder) { return open_registry(kernel_folder); }

int flash_num_kernels() { return num_kernels(); }

int flash_find(int kind, int head_dim, int dtype, int cc, int features) {
  ForwardParams forward = {};
  Want want = {kind, head_dim, dtype, cc};
  if (kind == FLASH_FORWARD && (features & FLASH_QV) != 0) {
    make_usual(&forward, head_dim, features, kRows);
    want.forward = &forward;
  }
  return find(want) != nullptr;
}

const char* flash_kernel_of(int kind, int head_dim, int dtype, int cc, int features) {
  ForwardParams forward = {};
  BackwardParams backward = {};
  Want want = {kind, head_dim, dtype, cc};
  if (kind == FLASH_BACKWARD) {
    make_usual(&backward, head_dim, features, kRows);
    backward.dout = backward.dq = backward.dk = backward.dv_grad = backward.q;
    want.backward = &backward;
  } else {
    make_usual(&forward, head_dim, features, kind == FLASH_DECODE ? 1 : kRows);
    want.forward = &forward;
  }
  const Kernel* found = find(want);
  return found == nullptr ? nullptr : found->symbol;
}

int flash_compute_capability(int ordinal) {
  const Device* on = device(ordinal);
  return on == nullptr ? 0 : on->cc;
}

int flash_plan_forward(int ordinal, int dtype, int num_splits, ForwardParams* params,
                       FlashWorkspace* workspace) {
  const Device* on = device(ordinal);
  return on != nullptr && plan_forward(*on, dtype, num_splits, params, workspace);
}

int flash_decode(int ordinal, void* stream, int dtype, const DecodeParams* params) {
  return enter(ordinal, stream, dtype, *params, wider(params->call.d, params->call.dv), decode);
}

int flash_forward(int ordinal, void* stream, int dtype, const ForwardParams* params) {
  return enter(ordinal, stream, dtype, *params, wider(params->d, params->dv), forward);
}

int flash_plan_backward(int ordinal, int dtype, BackwardParams* params, FlashWorkspace* workspace) {
  const Device* on = device(ordinal);
  return on != nullptr && plan_backward(*on, dtype, params, workspace);
}

int flash_backward(int ordinal, void* stream, int dtype, const BackwardParams* params) {
  return enter(ordinal, stream, dtype, *params, wider(params->d, params->dv), backward);
}

int flash_combine(int ordinal, void* stream, int dtype, const CombineParams* params) {
  return enter(ordinal, stream, dtype, *params, params->dv, combine);
}

int flash_append(int ordinal, void* stream, int dtype, const AppendParams* params) {
  return enter(ordinal, stream, dtype, *params, wider(params->d, params->dv), append);
}
