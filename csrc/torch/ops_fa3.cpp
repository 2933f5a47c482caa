// FlashAttention-3's operators: arguments in the order of their schemas, which
// flash_attn/_ops_fa3.py holds.
#include "torch/messages.h"
#include "torch/ops.h"

namespace flash::shim {

namespace {

// A forward call, and what it does not need.
struct Asked {
  Forward call = {};
  Tensor scheduler_metadata;
};

Asked take_forward(Arguments& in) {
  Asked asked;
  Forward& call = asked.call;
  call.q = in.tensor();
  call.k = in.tensor();
  call.v = in.tensor();
  call.append.k = in.optional_tensor();
  call.append.v = in.optional_tensor();
  call.qv = in.optional_tensor();
  call.out = in.optional_tensor();
  call.lengths.cu_seqlens_q = in.optional_tensor();
  call.lengths.cu_seqlens_k = in.optional_tensor();
  call.append.cu_seqlens = in.optional_tensor();
  call.lengths.seqused_q = in.optional_tensor();
  call.lengths.seqused_k = in.optional_tensor();
  call.lengths.max_seqlen_q = in.optional_integer();
  call.lengths.max_seqlen_k = in.optional_integer();
  call.lengths.block_table = in.optional_tensor();
  call.lengths.kv_batch_idx = in.optional_tensor();
  call.lengths.leftpad_k = in.optional_tensor();
  call.append.rotary_cos = in.optional_tensor();
  call.append.rotary_sin = in.optional_tensor();
  call.append.rotary_seqlens = in.optional_tensor();
  take_descale(in, &call.descale);
  const std::optional<double> scale = in.optional_number();
  const bool causal = in.flag();
  const int64_t left = in.integer();
  const int64_t right = in.integer();
  call.scores.mask = Mask::of(causal, left, right, in.integer());
  call.scores.softcap = in.number();
  call.append.rotary_interleaved = in.flag();
  asked.scheduler_metadata = in.optional_tensor();
  call.num_splits = in.integer();
  in.optional_flag();  // pack_gqa: a hint
  call.sm_margin = in.integer();
  call.scores.softmax_scale = scale ? *scale : default_scale(call.q, call.qv);
  return asked;
}

// Compilers may trace the operator because it writes none of its arguments.
void refuse_written(const Forward& call) {
  const Append& append = call.append;
  const std::pair<const char*, const Tensor&> written[] = {
      {"k_new", append.k},
      {"v_new", append.v},
      {"out_", call.out},
      {"cu_seqlens_k_new", append.cu_seqlens},
      {"rotary_cos", append.rotary_cos},
      {"rotary_sin", append.rotary_sin},
      {"seqlens_rotary", append.rotary_seqlens},
  };
  std::string given;
  for (const auto& [argument, x] : written) {
    if (x) given += (given.empty() ? "" : ", ") + std::string(argument);
  }
  if (given.empty()) return;
  fail(call.name,
       "the operator writes no argument, so that compilers may trace it: append through "
       "flash_attn_with_kvcache, and write into `out_` through flash_attn_3::fwd",
       given);
}

void check_new_keys(const Forward& call) {
  const Append& append = call.append;
  if (static_cast<bool>(append.k) != static_cast<bool>(append.v)) {
    const std::string given = append.k ? "key" : "value";
    const std::string missing = append.k ? "value" : "key";
    fail(call.name, "If " + given + " is supplied, " + missing + " must also be passed in",
         "no " + missing);
  }
  if (append.k) return;
  if (append.rotary_cos || append.rotary_sin) {
    fail(call.name,
         "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be "
         "provided",
         "k None");
  }
  if (append.cu_seqlens || append.rotary_seqlens) {
    const std::string argument = append.cu_seqlens ? "cu_seqlens_k_new" : "rotary_seqlens";
    fail(call.name, argument + " is about new keys, so k and v must also be given", "k None");
  }
}

void check_metadata(const Forward& call, const Tensor& metadata) {
  if (!metadata) return;
  const bool is_here = metadata.device_type() == call.q.device_type() &&
                       metadata.device_index() == call.q.device_index();
  if (metadata.dtype() == Dtype::kInt && is_here) return;
  fail(call.name,
       "scheduler_metadata must be int32 on " + device_text(call.q) +
           ", as get_scheduler_metadata returns it",
       dtype_text(metadata) + " on " + device_text(metadata));
}

void finish(Asked& asked, Results& out) {
  check_metadata(asked.call, asked.scheduler_metadata);
  ForwardResult result = run(asked.call);
  out.add(std::move(result.out));
  out.add(std::move(result.softmax_lse));
  // out_accum and softmax_lse_accum of a call that was not split.
  for (int i = 0; i < 2; ++i) out.add(empty({0}, Dtype::kFloat, asked.call.q));
}

void forward(Arguments& in, Results& out) {
  Asked asked = take_forward(in);
  asked.call.name = "flash_attn_3::_flash_attn_forward";
  refuse_written(asked.call);
  finish(asked, out);
}

void published_forward(Arguments& in, Results& out) {
  Asked asked = take_forward(in);
  asked.call.name = "flash_attn_3::fwd";
  check_new_keys(asked.call);
  finish(asked, out);
}

void backward(Arguments& in, Results& out) {
  Backward call = {};
  call.name = "flash_attn_3::_flash_attn_backward";
  call.dout = in.tensor();
  call.q = in.tensor();
  call.k = in.tensor();
  call.v = in.tensor();
  call.out = in.tensor();
  call.softmax_lse = in.tensor();
  call.lengths.cu_seqlens_q = in.optional_tensor();
  call.lengths.cu_seqlens_k = in.optional_tensor();
  call.lengths.seqused_q = in.optional_tensor();
  call.lengths.seqused_k = in.optional_tensor();
  call.lengths.max_seqlen_q = in.optional_integer();
  call.lengths.max_seqlen_k = in.optional_integer();
  call.dq = in.optional_tensor();
  call.dk = in.optional_tensor();
  call.dv = in.optional_tensor();
  const std::optional<double> scale = in.optional_number();
  const bool causal = in.flag();
  const int64_t left = in.integer();
  const int64_t right = in.integer();
  call.scores.mask = Mask::of(causal, left, right, 0);
  call.scores.softcap = in.number();
  call.deterministic = in.flag();
  call.sm_margin = in.integer();
  call.scores.softmax_scale = scale ? *scale : default_scale(call.q, Tensor());
  out.add(run(call));
}

}  // namespace

void serve_fa3(const char* fwd) {
  Library& library = served_in("flash_attn_3");
  library.implement<forward>("_flash_attn_forward");
  library.implement<backward>("_flash_attn_backward");
  library.implement<published_forward>(fwd);
}

}  // namespace flash::shim
