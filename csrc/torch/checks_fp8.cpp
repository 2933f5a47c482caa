// The rules of FP8 inputs, a part of check().
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

}  // namespace

void check_fp8(const Forward& call) {
  check_factor(call, "q_descale", call.descale.q, call.q);
  check_factor(call, "k_descale", call.descale.k, call.k);
  check_factor(call, "v_descale", call.descale.v, call.v);
  if (call.is_fp8() && call.scores.dropout_p > 0.0) {
    fail(call.name, "FP8 inputs on a GPU do not go with dropout",
         "dropout_p " + number_text(call.scores.dropout_p));
  }
}

}  // namespace flash::shim
