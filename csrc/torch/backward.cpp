// A backward call: scratch memory, gradients in place, launch.
#include "torch/operands.h"

namespace flash::shim {

namespace {

constexpr int64_t kRoundTo = 128;  // of softmax_d's rows, as published

}  // namespace

Tensor run(Backward& call) {
  check(call);
  tidy(&call.lengths, &call.scores);
  const int64_t b = call.batch_size();
  const int64_t hq = call.q.size(-2);
  const Tensor q = aligned(call.q);
  const Tensor k = aligned(call.k);
  const Tensor v = aligned(call.v);
  const Tensor out = aligned(call.out);
  const Tensor dout = aligned(call.dout);
  const Tensor lse = contiguous(call.softmax_lse);
  Written dq(call.dq, call.q, call.q.size(-1));
  Written dk(call.dk, call.k, call.k.size(-1));
  Written dv(call.dv, call.v, call.v.size(-1));
  Tensor softmax_d = call.is_packed()
                         ? empty({hq, q.size(0) + kRoundTo * b}, Dtype::kFloat, q)
                         : empty({b, hq, round_up(q.size(1), kRoundTo)}, Dtype::kFloat, q);

  BackwardParams params = {};
  params.q = rows_of(q);
  params.k = rows_of(k);
  params.v = rows_of(v);
  params.o = rows_of(out);
  params.dout = rows_of(dout);
  params.dq = rows_of(dq.tensor());
  params.dk = rows_of(dk.tensor());
  params.dv_grad = rows_of(dv.tensor());
  params.lse = pointer<const float>(lse);
  params.lse_head = lse.stride(-2);
  params.lse_batch = call.is_packed() ? 0 : lse.stride(0);
  params.delta = pointer<float>(softmax_d);
  params.delta_head = softmax_d.stride(-2);
  params.delta_batch = call.is_packed() ? 0 : softmax_d.stride(0);
  params.seqs = sequences_of(call.lengths, q, k, b);
  params.scores = scores_of(call.scores, hq);
  params.hq = static_cast<int32_t>(hq);
  params.hk = static_cast<int32_t>(k.size(-2));
  params.d = static_cast<int32_t>(q.size(-1));
  params.dv = static_cast<int32_t>(v.size(-1));
  params.deterministic = call.deterministic;
  params.sm_margin = static_cast<int32_t>(call.sm_margin);

  const int device = device_of(q);
  const int dtype = dtype_of(q);
  FlashWorkspace workspace = {};
  run_or_throw(call.name, flash_plan_backward(device, dtype, &params, &workspace));
  const int64_t floats = workspace.dq_accum + workspace.statistics + workspace.turns +
                         workspace.next_tile + workspace.finished + workspace.order;
  const Tensor scratch = empty({floats}, Dtype::kFloat, q);
  params.dq_accum = pointer<float>(scratch);
  if (workspace.statistics > 0) params.statistics = params.dq_accum + workspace.dq_accum;
  if (workspace.turns > 0) {
    params.turns = reinterpret_cast<int32_t*>(params.statistics + workspace.statistics);
  }
  if (workspace.next_tile > 0) {  // behind even numbers of floats
    params.next_block =
        reinterpret_cast<uint64_t*>(params.statistics + workspace.statistics + workspace.turns);
  }
  if (workspace.finished > 0) {
    params.finished = reinterpret_cast<int32_t*>(params.next_block) + workspace.next_tile;
    params.zeroed = params.finished + b * params.hk;
  }
  if (workspace.order > 0) {
    params.order = reinterpret_cast<uint32_t*>(params.finished + workspace.finished);
  }
  run_or_throw(call.name, flash_backward(device, current_stream(device), dtype, &params));
  dq.finish();
  dk.finish();
  dv.finish();
  return softmax_d;
}

}  // namespace flash::shim
