// torch's own attention on these kernels: flash_attn/_sdpa.py, whose operator of the same name
// serves what does not come here. Torch has a place for it from 2.11 on.
#include "torch/abi.h"

#ifndef FLASH_FULL_ABI

#include <algorithm>
#include <memory>

#include "torch/messages.h"
#include "torch/ops.h"

namespace flash::shim {

namespace {

constexpr const char* kForward = "_scaled_dot_product_flash_attention";

// (b, h, s, d) as (b, s, h, d).
Tensor rows_first(const Tensor& x) {
  const int64_t sizes[] = {x.size(0), x.size(2), x.size(1), x.size(3)};
  const int64_t strides[] = {x.stride(0), x.stride(2), x.stride(1), x.stride(3)};
  return view(x, sizes, strides, 4);
}

// As compilers expect a result: dense, its dimensions in the order of the query's strides.
Tensor result_like(const Tensor& query) {
  const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), query.size(3)};
  int64_t order[] = {0, 1, 2, 3};
  std::stable_sort(order, order + 4,
                   [&](int64_t i, int64_t j) { return query.stride(i) > query.stride(j); });
  int64_t strides[4];
  int64_t stride = 1;
  for (int64_t i = 3; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return empty_strided(sizes, strides, 4, query.dtype(), query);
}

void check_rank(const char* argument, const Tensor& x) {
  if (x.dim() == 4) return;
  fail(kForward,
       std::string(argument) + " must have shape (batch_size, num_heads, seqlen, head_size)",
       "shape " + shape_text(x));
}

void forward(Arguments& in, Results& out) {
  const Tensor query = in.tensor();
  const Tensor key = in.tensor();
  const Tensor value = in.tensor();
  Forward call = {};
  call.name = kForward;
  call.scores.dropout_p = in.number();
  const bool causal = in.flag();
  const bool has_dropout = call.scores.dropout_p > 0.0;
  call.return_softmax = in.flag() && has_dropout;
  const std::optional<double> scale = in.optional_number();
  check_rank("query", query);
  check_rank("key", key);
  check_rank("value", value);
  call.q = rows_first(query);
  call.k = rows_first(key);
  call.v = rows_first(value);
  Tensor attention = result_like(query);
  call.out = rows_first(attention);
  call.scores.mask = Mask::of(causal, -1, -1, 0);
  call.scores.softmax_scale = scale ? *scale : default_scale(query, Tensor());
  if (has_dropout) call.scores.rng_state = make_rng_state(query, call.scores.dropout_p);
  ForwardResult result = run(call);
  out.add(std::move(attention));
  out.add(std::move(result.softmax_lse));
  out.add_undefined();  // cum_seq_q
  out.add_undefined();  // cum_seq_k
  out.add(query.size(2));
  out.add(key.size(2));
  out.add(has_dropout ? reinterpreted(call.scores.rng_state, Dtype::kUlong)
                      : empty({2}, Dtype::kUlong, query));
  out.add(empty({}, Dtype::kUlong, query));
  add_s_dmask(out, std::move(result.s_dmask), query);
}

}  // namespace

void serve_sdpa(bool is_on) {
  static auto& library = *new std::unique_ptr<Library>;  // torch may end first
  library.reset();
  if (!is_on) return;
  library = std::make_unique<Library>("aten", "CUDA");
  library->implement<forward>(kForward);
}

}  // namespace flash::shim

#endif  // FLASH_FULL_ABI
