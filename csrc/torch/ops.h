// What the files of operators share, and what they make known to torch.
#pragma once

#include <cmath>
#include <utility>

#include "torch/operands.h"

namespace flash::shim {

inline void take_descale(Arguments& in, Descale* descale) {
  descale->q = in.optional_tensor();
  descale->k = in.optional_tensor();
  descale->v = in.optional_tensor();
}

// softmax_scale where none is given: d ** -0.5, or (d + dv) ** -0.5 with a second query.
inline double default_scale(const Tensor& q, const Tensor& qv) {
  int64_t head_dim = q.dim() > 0 ? q.size(-1) : 0;
  if (qv && qv.dim() > 0) head_dim += qv.size(-1);
  return head_dim > 0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : 1.0;
}

// A result that has no elements has a storage of its own even so: results of an operator must not
// share one.
inline void add_s_dmask(Results& out, Tensor s_dmask, const Tensor& q) {
  out.add(s_dmask ? std::move(s_dmask) : empty({0}, q.dtype(), q));
}

// A place for operators that run here for CUDA tensors, until they stop.
Library& served_in(const char* space);

// From here on FlashAttention-3's operators run here for CUDA tensors; `fwd` is the name that its
// published one has got (flash_attn/_registration.py).
void serve_fa3(const char* fwd);

// Puts a dense forward call of torch's own attention on CUDA tensors here, or takes it back.
void serve_sdpa(bool is_on);

}  // namespace flash::shim
