// The rules of FP8 inputs, a part of check().
#include "torch/messages.h"

namespace flash::shim {

namespace {

void check_factor(const Forward& call, const char* argument, const Tensor& factor) {
  if (!factor) return;
  const std::string name = argument;
  if (!call.is_fp8()) {
    fail(call.name, name + " goes with FP8 inputs only", "q of " + dtype_text(call.q));
  }
  if (factor.dtype() != Dtype::kFloat) {
    fail(call.name, name + " must have dtype float32", dtype_text(factor));
  }
  check_shape(call.name, argument, factor, {call.batch_size(), call.k.size(-2)},
              "(batch_size, num_heads_k)");
}

}  // namespace

void check_fp8(const Forward& call) {
  check_factor(call, "q_descale", call.descale.q);
  check_factor(call, "k_descale", call.descale.k);
  check_factor(call, "v_descale", call.descale.v);
  if (!call.is_fp8()) return;
  const char* given = call.append.k                 ? "new keys"
                      : call.lengths.block_table    ? "a block_table"
                      : call.scores.dropout_p > 0.0 ? "dropout"
                                                    : nullptr;
  if (given != nullptr) {
    fail(call.name, "FP8 inputs on a GPU go with neither new keys, block_table nor dropout", given);
  }
}

}  // namespace flash::shim
