// The operators: arguments in the order of their schemas, which flash_attn/_ops.py holds.
#include "torch/ops.h"

#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include "host/api.h"
#include "torch/messages.h"
#include "torch/operands.h"

#ifdef _WIN32
#define FLASH_SHIM_API extern "C" __declspec(dllexport)
#else
#define FLASH_SHIM_API extern "C" __attribute__((visibility("default")))
#endif

namespace flash::shim {

namespace {

// softmax_scale, causal and window, of the places where the published schemas have them.
void take_scores(Arguments& in, Scoring* scores, bool causal) {
  const int64_t left = in.integer();
  const int64_t right = in.integer();
  scores->mask = Mask::of(causal, left, right, 0);
  scores->softcap = in.number();
  scores->alibi_slopes = in.optional_tensor();
}

void finish_forward(Forward& call, Results& out) {
  Tensor rng_state = make_rng_state(call.q, call.scores.dropout_p);
  if (call.scores.dropout_p > 0.0) call.scores.rng_state = rng_state.share();
  ForwardResult result = run(call);
  out.add(std::move(result.out));
  out.add(std::move(result.softmax_lse));
  add_s_dmask(out, std::move(result.s_dmask), call.q);
  out.add(std::move(rng_state));
}

void finish_plain_forward(Forward& call, Results& out) {
  if (call.scores.dropout_p != 0.0) {
    fail_value(call.name, "dropout_p must be 0", number_text(call.scores.dropout_p));
  }
  ForwardResult result = run(call);
  out.add(std::move(result.out));
  out.add(std::move(result.softmax_lse));
}

using Finish = void (*)(Forward&, Results&);

template <Finish finish>
void forward(Arguments& in, Results& out) {
  Forward call = {};
  call.name = "flash_attn::_flash_attn_forward";
  call.q = in.tensor();
  call.k = in.tensor();
  call.v = in.tensor();
  call.scores.dropout_p = in.number();
  call.scores.softmax_scale = in.number();
  const bool causal = in.flag();
  take_scores(in, &call.scores, causal);
  call.return_softmax = in.flag();
  finish(call, out);
}

template <Finish finish>
void varlen_forward(Arguments& in, Results& out) {
  Forward call = {};
  call.name = "flash_attn::_flash_attn_varlen_forward";
  call.q = in.tensor();
  call.k = in.tensor();
  call.v = in.tensor();
  call.lengths.cu_seqlens_q = in.tensor();
  call.lengths.cu_seqlens_k = in.tensor();
  call.lengths.max_seqlen_q = in.integer();
  call.lengths.max_seqlen_k = in.integer();
  call.scores.dropout_p = in.number();
  call.scores.softmax_scale = in.number();
  const bool causal = in.flag();
  take_scores(in, &call.scores, causal);
  call.return_softmax = in.flag();
  call.lengths.block_table = in.optional_tensor();
  call.lengths.leftpad_k = in.optional_tensor();
  call.lengths.seqused_k = in.optional_tensor();
  in.flag();  // zero_tensors: every output is written anyway
  finish(call, out);
}

void with_kvcache(Arguments& in, Results& out) {
  Forward call = {};
  call.name = "flash_attn::_flash_attn_with_kvcache";
  call.q = in.tensor();
  call.k = in.tensor();
  call.v = in.tensor();
  call.append.k = in.optional_tensor();
  call.append.v = in.optional_tensor();
  call.qv = in.optional_tensor();
  call.append.rotary_cos = in.optional_tensor();
  call.append.rotary_sin = in.optional_tensor();
  call.lengths.seqused_k = in.optional_tensor();
  call.lengths.kv_batch_idx = in.optional_tensor();
  call.lengths.leftpad_k = in.optional_tensor();
  call.lengths.block_table = in.optional_tensor();
  call.lengths.cu_seqlens_q = in.optional_tensor();
  call.append.cu_seqlens = in.optional_tensor();
  call.lengths.max_seqlen_q = in.optional_integer();
  call.append.rotary_seqlens = in.optional_tensor();
  take_descale(in, &call.descale);
  call.scores.softmax_scale = in.number();
  const bool causal = in.flag();
  const int64_t left = in.integer();
  const int64_t right = in.integer();
  call.scores.mask = Mask::of(causal, left, right, in.integer());
  call.scores.softcap = in.number();
  call.append.rotary_interleaved = in.flag();
  call.scores.alibi_slopes = in.optional_tensor();
  call.num_splits = in.integer();
  call.sm_margin = in.integer();
  if (!call.append.k || !call.append.v) call.append = {};
  ForwardResult result = run(call);
  out.add(std::move(result.out));
  out.add(std::move(result.softmax_lse));
}

void take_tensors(Arguments& in, Backward* call) {
  call->dout = in.tensor();
  call->q = in.tensor();
  call->k = in.tensor();
  call->v = in.tensor();
  call->out = in.tensor();
  call->softmax_lse = in.tensor();
  call->dq = in.optional_tensor();
  call->dk = in.optional_tensor();
  call->dv = in.optional_tensor();
}

// From dropout_p to rng_state.
void take_rules(Arguments& in, Backward* call) {
  call->scores.dropout_p = in.number();
  call->scores.softmax_scale = in.number();
  const bool causal = in.flag();
  take_scores(in, &call->scores, causal);
  call->deterministic = in.flag();
  Tensor rng_state = in.optional_tensor();
  if (call->scores.dropout_p > 0.0) call->scores.rng_state = std::move(rng_state);
}

void backward(Arguments& in, Results& out) {
  Backward call = {};
  call.name = "flash_attn::_flash_attn_backward";
  take_tensors(in, &call);
  take_rules(in, &call);
  out.add(run(call));
}

void varlen_backward(Arguments& in, Results& out) {
  Backward call = {};
  call.name = "flash_attn::_flash_attn_varlen_backward";
  take_tensors(in, &call);
  call.lengths.cu_seqlens_q = in.tensor();
  call.lengths.cu_seqlens_k = in.tensor();
  call.lengths.max_seqlen_q = in.integer();
  call.lengths.max_seqlen_k = in.integer();
  take_rules(in, &call);
  in.flag();  // zero_tensors: every output is written anyway
  out.add(run(call));
}

// What FlashAttention-3's backward asks for beyond the published operators: lengths in use, and
// multiprocessors for others.
constexpr const char* kGeneralBackwardSchema =
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, float dropout_p, "
    "float softmax_scale, bool causal, int window_left, int window_right, float softcap, "
    "Tensor? alibi_slopes, bool deterministic, Tensor? rng_state, int sm_margin=0) -> Tensor";

void general_backward(Arguments& in, Results& out) {
  Backward call = {};
  call.name = "flash_attn_cuda::backward";
  call.dout = in.tensor();
  call.q = in.tensor();
  call.k = in.tensor();
  call.v = in.tensor();
  call.out = in.tensor();
  call.softmax_lse = in.tensor();
  call.dq = in.tensor();
  call.dk = in.tensor();
  call.dv = in.tensor();
  call.lengths.cu_seqlens_q = in.optional_tensor();
  call.lengths.cu_seqlens_k = in.optional_tensor();
  call.lengths.seqused_q = in.optional_tensor();
  call.lengths.seqused_k = in.optional_tensor();
  call.lengths.max_seqlen_q = in.optional_integer();
  call.lengths.max_seqlen_k = in.optional_integer();
  take_rules(in, &call);
  call.sm_margin = in.integer();
  out.add(run(call));
}

// Everything a forward call can ask for, for the paths that go through Python.
constexpr const char* kGeneralSchema =
    "forward(Tensor q, Tensor(a!) k, Tensor(b!) v, Tensor? qv, Tensor(c!)? out, Tensor? k_new, "
    "Tensor? v_new, Tensor? cu_seqlens_k_new, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? rotary_seqlens, bool rotary_interleaved, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_q, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, "
    "Tensor? kv_batch_idx, int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, "
    "int window_left, int window_right, int attention_chunk, float softcap, Tensor? alibi_slopes, "
    "float dropout_p, Tensor? rng_state, bool return_softmax, int num_splits, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor)";

void general_forward(Arguments& in, Results& out) {
  Forward call = {};
  call.name = "flash_attn_cuda::forward";
  call.q = in.tensor();
  call.k = in.tensor();
  call.v = in.tensor();
  call.qv = in.optional_tensor();
  call.out = in.optional_tensor();
  call.append.k = in.optional_tensor();
  call.append.v = in.optional_tensor();
  call.append.cu_seqlens = in.optional_tensor();
  call.append.rotary_cos = in.optional_tensor();
  call.append.rotary_sin = in.optional_tensor();
  call.append.rotary_seqlens = in.optional_tensor();
  call.append.rotary_interleaved = in.flag();
  call.lengths.cu_seqlens_q = in.optional_tensor();
  call.lengths.cu_seqlens_k = in.optional_tensor();
  call.lengths.seqused_q = in.optional_tensor();
  call.lengths.seqused_k = in.optional_tensor();
  call.lengths.leftpad_k = in.optional_tensor();
  call.lengths.block_table = in.optional_tensor();
  call.lengths.kv_batch_idx = in.optional_tensor();
  call.lengths.max_seqlen_q = in.optional_integer();
  call.lengths.max_seqlen_k = in.optional_integer();
  call.scores.softmax_scale = in.number();
  const int64_t left = in.integer();
  const int64_t right = in.integer();
  call.scores.mask = Mask::of(false, left, right, in.integer());
  call.scores.softcap = in.number();
  call.scores.alibi_slopes = in.optional_tensor();
  call.scores.dropout_p = in.number();
  call.scores.rng_state = in.optional_tensor();
  call.return_softmax = in.flag();
  call.num_splits = in.integer();
  take_descale(in, &call.descale);
  call.sm_margin = in.integer();
  ForwardResult result = run(call);
  out.add(std::move(result.out));
  out.add(std::move(result.softmax_lse));
  add_s_dmask(out, std::move(result.s_dmask), call.q);
}

constexpr const char* kCombineSchema =
    "combine(Tensor out_partial, Tensor lse_partial) -> (Tensor, Tensor)";

void combine_parts(Arguments& in, Results& out) {
  const Tensor out_partial = in.tensor();
  const Tensor lse_partial = in.tensor();
  Merged merged = combine("flash_attn_cuda::combine", out_partial, lse_partial);
  out.add(std::move(merged.out));
  out.add(std::move(merged.softmax_lse));
}

// Of operators that run here for CUDA tensors.
auto& g_served = *new std::vector<std::unique_ptr<Library>>;

void define_general() {
  // Never taken back, not even when the process ends: torch may end first.
  static auto& definitions = *new Library("flash_attn_cuda", nullptr);
  definitions.define(kGeneralSchema);
  definitions.define(kGeneralBackwardSchema);
  definitions.define(kCombineSchema);
  // Any dispatch key: the tests run it on CPU memory, with a driver of their own.
  static auto& implementations = *new Library("flash_attn_cuda", "CompositeExplicitAutograd");
  implementations.implement<general_forward>("forward");
  implementations.implement<general_backward>("backward");
  implementations.implement<combine_parts>("combine");
}

void serve_published() {
  Library& library = served_in("flash_attn");
  library.implement<forward<finish_forward>>("_flash_attn_forward");
  library.implement<varlen_forward<finish_forward>>("_flash_attn_varlen_forward");
  library.implement<backward>("_flash_attn_backward");
  library.implement<varlen_backward>("_flash_attn_varlen_backward");
  library.implement<with_kvcache>("_flash_attn_with_kvcache");
  Library& plain = served_in("flash_attn_cuda");
  plain.implement<forward<finish_plain_forward>>("_flash_attn_forward");
  plain.implement<varlen_forward<finish_plain_forward>>("_flash_attn_varlen_forward");
}

// Null, or what `action` throws, in words.
template <class Action>
const char* told(const Action& action) {
  static char problem[1024];
  try {
    action();
  } catch (const std::exception& error) {
    snprintf(problem, sizeof(problem), "%s", error.what());
    return problem;
  }
  return nullptr;
}

}  // namespace

Library& served_in(const char* space) {
  g_served.push_back(std::make_unique<Library>(space, "CUDA"));
  return *g_served.back();
}

}  // namespace flash::shim

// Opens the kernels and defines `flash_attn_cuda::`; with `direct`, the published operators run
// here for CUDA tensors without passing through Python. Null, or what went wrong. Call it once.
FLASH_SHIM_API const char* flash_attn_serve(const char* kernel_folder, int direct) {
  if (flash_open(kernel_folder) == 0) return flash_last_error();
  return flash::shim::told([&] {
    flash::shim::define_general();
    if (direct != 0) flash::shim::serve_published();
  });
}

// Takes back all that runs here for CUDA tensors. Null, or what went wrong.
FLASH_SHIM_API const char* flash_attn_stop_serving() {
  return flash::shim::told([] {
    flash::shim::g_served.clear();
#ifndef FLASH_FULL_ABI
    flash::shim::serve_sdpa(false);
#endif
  });
}

// serve_fa3() and, from torch 2.11 on, serve_sdpa(). Null, or what went wrong.
FLASH_SHIM_API const char* flash_attn_serve_fa3(const char* fwd) {
  return flash::shim::told([&] { flash::shim::serve_fa3(fwd); });
}

#ifndef FLASH_FULL_ABI
FLASH_SHIM_API const char* flash_attn_serve_sdpa(int is_on) {
  return flash::shim::told([&] { flash::shim::serve_sdpa(is_on != 0); });
}
#endif
