// One call as plain data: what the operators say to the code that runs them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "host/flash.h"
#include "torch/abi.h"

namespace flash::shim {

// Which keys a query sees; below zero: unbounded.
struct Mask {
  int64_t left = -1;
  int64_t right = -1;
  int64_t chunk = 0;

  static Mask of(bool causal, int64_t left, int64_t right, int64_t chunk) {
    const auto bound = [](int64_t x) { return x < 0 ? int64_t{-1} : x; };
    return {bound(left), causal ? 0 : bound(right), chunk};
  }
};

struct Scoring {
  double softmax_scale = 1.0;
  Mask mask;
  double softcap = 0.0;
  Tensor alibi_slopes;
  double dropout_p = 0.0;
  Tensor rng_state;
};

struct Lengths {
  Tensor cu_seqlens_q, cu_seqlens_k;
  Tensor seqused_q, seqused_k;
  Tensor leftpad_k;
  Tensor block_table;
  Tensor kv_batch_idx;
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
};

// New rows for the cache.
struct Append {
  Tensor k, v;
  Tensor cu_seqlens;
  Tensor rotary_cos, rotary_sin;
  Tensor rotary_seqlens;
  bool rotary_interleaved = true;
};

// Factors (b, hk) that undo the scaling of FP8 inputs.
struct Descale {
  Tensor q, k, v;
};

constexpr int64_t kNarrow = 64;  // head dim of q and k that goes with a wider V

struct Forward {
  const char* name;
  Tensor q, k, v;
  Tensor qv;   // a second query, against v, if given
  Tensor out;  // written in place if given
  Scoring scores;
  Lengths lengths;
  Append append;
  Descale descale;
  bool return_softmax = false;
  int64_t num_splits = 0;
  int64_t sm_margin = 0;

  bool is_fp8() const { return k.dtype() == Dtype::kE4m3; }  // q may have 16 bits
  // Latent attention's absorbed form, which has kernels of its own.
  bool is_latent() const { return qv || v.size(-1) > kWidest; }
  bool is_packed_q() const { return static_cast<bool>(lengths.cu_seqlens_q); }
  bool is_packed_k() const { return lengths.cu_seqlens_k && !lengths.block_table; }
  int64_t batch_size() const {
    return is_packed_q() ? lengths.cu_seqlens_q.size(0) - 1 : q.size(0);
  }
};

struct Backward {
  const char* name;
  Tensor dout, q, k, v, out, softmax_lse;
  Tensor dq, dk, dv;  // written in place if given
  Scoring scores;
  Lengths lengths;
  bool deterministic = false;
  int64_t sm_margin = 0;

  bool is_packed() const { return static_cast<bool>(lengths.cu_seqlens_q); }
  int64_t batch_size() const { return is_packed() ? lengths.cu_seqlens_q.size(0) - 1 : q.size(0); }
};

// Raises RuntimeError (ValueError for `fail_value`) in the package's one style:
// "function: rule; got what was given".
[[noreturn]] void fail(const char* name, const std::string& rule, const std::string& got);
[[noreturn]] void fail_value(const char* name, const std::string& rule, const std::string& got);

// "(2, 3, 4)", as Python writes it.
std::string shape_text(const Tensor& x);

void check(const Forward& call);
void check_latent(const Forward& call);
void check_fa3(const Forward& call);
void check_sm_margin(const char* name, int64_t sm_margin);
void check(const Backward& call);

struct ForwardResult {
  Tensor out, softmax_lse;
  Tensor s_dmask;  // none unless asked for
};

ForwardResult run(Forward& call);

// softmax_d.
Tensor run(Backward& call);

struct Merged {
  Tensor out, softmax_lse;
};

// Attention over parts of the keys, (splits, b, s, h, d) and (splits, b, s, h), merged; float.
Merged combine(const char* name, const Tensor& out_partial, const Tensor& lse_partial);

}  // namespace flash::shim
