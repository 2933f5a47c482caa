// A forward call: append to the cache if asked for, plan, allocate, launch.
#include <algorithm>

#include "torch/operands.h"

namespace flash::shim {

namespace {

constexpr int64_t kRoundTo = 128;  // of S_dmask's rows and columns, as published

// New rows as the kernels read them, made so in place.
NewRows new_rows_of(Append* append, const Mask& mask) {
  NewRows rows = {};
  if (!append->k) return rows;
  for (Tensor* x : {&append->cu_seqlens, &append->rotary_seqlens}) {
    if (*x) *x = contiguous(*x);
  }
  for (Tensor* x : {&append->k, &append->v}) *x = aligned(*x);
  rows.k = rows_of(append->k);
  rows.v = rows_of(append->v);
  rows.cu_seqlens = pointer<const int32_t>(append->cu_seqlens);
  rows.count = static_cast<int32_t>(append->k.size(append->cu_seqlens ? 0 : 1));
  rows.rotary_seqlens = pointer<const int32_t>(append->rotary_seqlens);
  if (append->rotary_cos) {
    for (Tensor* x : {&append->rotary_cos, &append->rotary_sin}) *x = aligned(contiguous(*x));
    rows.rotary_dim = static_cast<int32_t>(2 * append->rotary_cos.size(1));
    rows.rotary_rows = static_cast<int32_t>(append->rotary_cos.size(0));
    rows.rotary_interleaved = append->rotary_interleaved;
    // Without a mask every query stands where the first new key does.
    rows.queries_stay = mask.left < 0 && mask.right < 0 && mask.chunk == 0;
    rows.rotary_cos = append->rotary_cos.data();
    rows.rotary_sin = append->rotary_sin.data();
  }
  return rows;
}

// Writes new rows into the cache; returns the rotated queries, or none where nothing rotates.
Tensor append_rows(const Forward& call, const ForwardParams& forward, const NewRows& added,
                   void* stream) {
  const Tensor q = aligned(call.q);
  Tensor q_rotated;
  AppendParams params = {};
  params.added = added;
  params.k = forward.k;
  params.v = forward.v;
  params.seqs = forward.seqs;
  params.hq = forward.hq;
  params.hk = forward.hk;
  params.d = forward.d;
  params.dv = forward.dv;
  if (added.rotary_cos != nullptr) {
    q_rotated = empty_like_rows(q, q.size(-1));
    params.q = rows_of(q);
    params.q_rotated = rows_of(q_rotated);
  }
  run_or_throw(call.name, flash_append(device_of(q), stream, dtype_of(q), &params));
  return q_rotated;
}

struct Lse {
  Tensor lse;
  float* scratch = nullptr;
};

// `scratch` floats stand behind it, at a multiple of 8 bytes: a view costs less than a second
// allocation.
Lse make_lse(const Forward& call, int64_t scratch) {
  const Tensor& q = call.q;
  const int64_t rows = q.size(call.is_packed_q() ? 0 : 1);
  const int64_t heads = q.size(-2);
  const int64_t size[] = {call.is_packed_q() ? 1 : q.size(0), heads, rows};
  const int64_t stride[] = {heads * rows, rows, 1};
  const int first = call.is_packed_q() ? 1 : 0;
  if (scratch == 0)
    return {empty_strided(size + first, stride + first, 3 - first, Dtype::kFloat, q)};
  const int64_t floats = round_up(size[0] * stride[0], 2);
  const Tensor memory = empty({floats + scratch}, Dtype::kFloat, q);
  return {view(memory, size + first, stride + first, 3 - first), pointer<float>(memory) + floats};
}

// Entries that no row or key has are zero.
Tensor make_s_dmask(const Forward& call, const Sequences& seqs) {
  Tensor made = empty({call.batch_size(), call.q.size(-2), round_up(seqs.sq, kRoundTo),
                       round_up(seqs.sk, kRoundTo)},
                      call.q.dtype(), call.q);
  zero(made);
  return made;
}

// What a plan must know: all but pointers.
ForwardParams sizes_of(const Forward& call) {
  ForwardParams params = {};
  params.seqs = sequences_of(call.lengths, call.q, call.k, call.batch_size());
  params.scores = scores_of(call.scores, call.q.size(-2));
  params.hq = static_cast<int32_t>(call.q.size(-2));
  params.hk = static_cast<int32_t>(call.k.size(-2));
  params.d = static_cast<int32_t>(round_up(call.q.size(-1), chunk_of(call.q)));
  params.dv = static_cast<int32_t>(round_up(call.v.size(-1), chunk_of(call.q)));
  params.has_qv = static_cast<bool>(call.qv);
  params.sm_margin = static_cast<int32_t>(call.sm_margin);
  params.q_dtype = dtype_of(call.q);
  return params;
}

// Its kernels copy operands by tensor maps, which know no dimension that repeats one row.
void spread_latent(Forward* call) {
  for (Tensor* x : {&call->q, &call->qv}) {
    if (*x && repeats_rows(*x)) *x = contiguous(*x);
  }
  for (Tensor* x : {&call->k, &call->v}) {
    if (!call->append.k && repeats_rows(*x)) *x = contiguous(*x);
  }
}

bool has_pairs(const Forward& call, const Sequences& seqs) {
  const bool has_keys = call.is_packed_k() ? seqs.total_k > 0 : call.k.size(0) > 0;
  return seqs.sq > 0 && seqs.sk > 0 && call.q.size(0) > 0 && has_keys;
}

}  // namespace

ForwardResult run(Forward& call) {
  check(call);
  tidy(&call.lengths, &call.scores);
  if (call.is_latent()) spread_latent(&call);
  const int device = device_of(call.q);
  const int dtype = dtype_of(call.k);
  void* stream = current_stream(device);
  ForwardParams params = sizes_of(call);
  // Of a call without pairs of a query and a key, any kernel writes the log-sum-exp.
  const bool is_empty = call.is_latent() && !has_pairs(call, params.seqs);
  if (is_empty) {
    params.has_qv = 0;
    params.dv = std::min(params.dv, kWidest);
  }
  FlashWorkspace workspace = {};
  run_or_throw(call.name, flash_plan_forward(device, dtype, static_cast<int>(call.num_splits),
                                             &params, &workspace));

  Written k(call.k);
  Written v(call.v);
  Tensor rotated;
  params.k = rows_of(k.tensor());
  params.v = rows_of(v.tensor());
  const NewRows added = new_rows_of(&call.append, call.scores.mask);
  if (call.append.k) {
    if (workspace.decodes == 0) rotated = append_rows(call, params, added, stream);
    params.seqs.cu_seqlens_k_new = added.cu_seqlens;
    params.seqs.sk_new = added.cu_seqlens == nullptr ? added.count : 0;
  }
  const Tensor other_q = rotated ? std::move(rotated) : aligned_copy(call.q);
  const Tensor& q = other_q ? other_q : call.q;
  const Tensor qv = params.has_qv != 0 ? aligned(call.qv) : Tensor();
  const int64_t dv = call.v.size(-1);
  Written out(call.out, call.q, dv);
  if (is_empty) zero(out.tensor());
  // Floats behind the log-sum-exp would keep the parts of a decode call alive with it.
  Lse made = make_lse(call, workspace.decodes != 0 ? 0 : workspace.next_tile + workspace.order);
  ForwardResult result = {Tensor(), std::move(made.lse), Tensor()};
  params.q = rows_of(q);
  params.qv = rows_of(qv);
  params.o = rows_of(out.tensor());
  params.q_descale = factors_of(call.descale.q);
  params.k_descale = factors_of(call.descale.k);
  params.v_descale = factors_of(call.descale.v);
  params.lse = pointer<float>(result.softmax_lse);
  if (made.scratch != nullptr) {
    if (workspace.order != 0) params.line = reinterpret_cast<Line*>(made.scratch);
    params.next_tile = reinterpret_cast<uint64_t*>(made.scratch + workspace.order);
  }
  params.lse_head = result.softmax_lse.stride(-2);
  params.lse_batch = call.is_packed_q() ? 0 : result.softmax_lse.stride(0);
  if (call.return_softmax) {
    result.s_dmask = make_s_dmask(call, params.seqs);
    params.s_dmask = result.s_dmask.data();
    params.s_dmask_rows = static_cast<int32_t>(result.s_dmask.size(2));
    params.s_dmask_cols = static_cast<int32_t>(result.s_dmask.size(3));
  }
  Tensor parts;
  if (workspace.o_partial > 0) {
    // An allocation costs a microsecond: one for all.
    const int64_t counters = workspace.decodes != 0 ? workspace.next_tile : 0;
    parts = empty({workspace.o_partial + workspace.lse_partial + counters}, Dtype::kFloat, q);
    params.o_partial = pointer<float>(parts);
    params.lse_partial = params.o_partial + workspace.o_partial;
    if (counters > 0) {
      params.next_tile = reinterpret_cast<uint64_t*>(params.lse_partial + workspace.lse_partial);
    }
  }
  if (workspace.decodes != 0) {
    DecodeParams with_rows = {};
    with_rows.call = params;
    with_rows.added = added;
    run_or_throw(call.name, flash_decode(device, stream, dtype, &with_rows));
  } else {
    run_or_throw(call.name, flash_forward(device, stream, dtype, &params));
  }
  if (call.append.k) {
    k.finish();
    v.finish();
  }
  out.finish();
  result.out = out.result(dv);
  return result;
}

}  // namespace flash::shim
