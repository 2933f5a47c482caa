// The rules of a second query, and of V wider than other kernels take, a part of check(): what
// latent attention becomes when its projections are absorbed.
#include "torch/messages.h"
#include "torch/operands.h"

namespace flash::shim {

namespace {

constexpr int kCapability = 90;  // that its kernels are for

void check_second_query(const Forward& call) {
  check_like_q(call.name, "qv", call.qv, call.q, call.v.size(-1));
  if (call.qv.dtype() != call.q.dtype() || call.q.dtype() == Dtype::kE4m3) {
    fail(call.name, "qv must have the dtype of q, and not FP8",
         dtype_text(call.qv) + ", q " + dtype_text(call.q));
  }
}

// What a call must be for the kernels; flash_attn/backends/cuda.py and flash_attn/_support.py
// tell those who come through Python.
void check_kernels(const Forward& call) {
  const std::string what = call.qv ? "qv" : "V wider than " + text(kWidest);
  const int cc = flash_compute_capability(device_of(call.q));
  // 0: planning says what is wrong with the device.
  if (cc != 0 && cc != kCapability) {
    fail(call.name,
         what + " has CUDA kernels for compute capability 9.0 alone (H100, H200): run it there, " +
             "or on CPU tensors",
         "a device of " + text(cc / 10) + "." + text(cc % 10));
  }
  if (call.q.size(-1) > kNarrow) {
    fail(call.name, what + " on a GPU goes with head dims of q and k up to " + text(kNarrow),
         text(call.q.size(-1)));
  }
  if (call.is_fp8()) {
    fail(call.name, what + " on a GPU does not go with FP8 inputs", "k of " + dtype_text(call.k));
  }
  if (call.scores.dropout_p > 0.0) {
    fail(call.name, what + " on a GPU does not go with dropout",
         "dropout_p " + number_text(call.scores.dropout_p));
  }
}

}  // namespace

void check_latent(const Forward& call) {
  if (call.qv) check_second_query(call);
  if (call.is_latent()) check_kernels(call);
}

}  // namespace flash::shim
