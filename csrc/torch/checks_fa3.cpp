// The rules of what FlashAttention-3's functions add, parts of check().
#include "torch/messages.h"

namespace flash::shim {

namespace {

void check_factor(const Forward& call, const char* argument, const Tensor& factor,
                  const Tensor& of) {
  if (!factor) return;
  const std::string name = argument;
  if (of.dtype() != Dtype::kE4m3) {
    fail(call.name, name + " goes with FP8 inputs only",
         name.substr(0, 1) + " of " + dtype_text(of));
  }
  if (factor.dtype() != Dtype::kFloat) {
    fail(call.name, name + " must have dtype float32", dtype_text(factor));
  }
  check_shape(call.name, argument, factor, {call.batch_size(), call.k.size(-2)},
              "(batch_size, num_heads_k)");
}

void check_out(const Forward& call) {
  const bool is_bf16 = call.q.dtype() != Dtype::kHalf;  // of FP8 too
  if (call.out.dtype() != (is_bf16 ? Dtype::kBfloat16 : Dtype::kHalf)) {
    fail(call.name, std::string("out must have dtype torch.") + (is_bf16 ? "bfloat16" : "float16"),
         dtype_text(call.out));
  }
  check_like_q(call.name, "out", call.out, call.q, call.v.size(-1));
}

}  // namespace

void check_sm_margin(const char* name, int64_t sm_margin) {
  if (sm_margin < 0) fail_value(name, "sm_margin must be 0 or positive", text(sm_margin));
}

void check_fa3(const Forward& call) {
  check_sm_margin(call.name, call.sm_margin);
  check_factor(call, "q_descale", call.descale.q, call.q);
  check_factor(call, "k_descale", call.descale.k, call.k);
  check_factor(call, "v_descale", call.descale.v, call.v);
  if (call.is_fp8() && call.scores.dropout_p > 0.0) {
    fail(call.name, "FP8 inputs on a GPU do not go with dropout",
         "dropout_p " + number_text(call.scores.dropout_p));
  }
  if (call.out) check_out(call);
}

}  // namespace flash::shim
