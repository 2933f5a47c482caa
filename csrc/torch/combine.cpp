// Merging parts of attention that the caller computed.
#include "torch/messages.h"
#include "torch/operands.h"

namespace flash::shim {

namespace {

void check_parts(const char* name, const Tensor& out_partial, const Tensor& lse_partial) {
  if (out_partial.dtype() != Dtype::kFloat || lse_partial.dtype() != Dtype::kFloat) {
    fail(name, "out_partial and lse_partial must have dtype float32",
         dtype_text(out_partial) + ", " + dtype_text(lse_partial));
  }
  const Tensor& x = out_partial;
  if (x.dim() != 5 || !has_shape(lse_partial, {x.size(0), x.size(1), x.size(2), x.size(3)})) {
    fail(name,
         "out_partial must have shape (num_splits, b, s, h, d) and lse_partial the same without d",
         "shapes " + shape_text(out_partial) + " and " + shape_text(lse_partial));
  }
}

Parts parts_of(const Tensor& x) {
  return {static_cast<const float*>(x.data()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

}  // namespace

Merged combine(const char* name, const Tensor& out_partial, const Tensor& lse_partial) {
  check_parts(name, out_partial, lse_partial);
  const Tensor parts = aligned(out_partial);
  const int64_t b = parts.size(1);
  const int64_t s = parts.size(2);
  const int64_t h = parts.size(3);
  Tensor out = empty({b, s, h, parts.size(4)}, Dtype::kFloat, parts);
  Tensor lse = empty({b, s, h}, Dtype::kFloat, parts);

  CombineParams params = {};
  params.o_partial = parts_of(parts);
  params.lse_partial = parts_of(lse_partial);
  params.o = rows_of(out);
  params.o_is_float = 1;
  params.lse = pointer<float>(lse);
  params.lse_batch = lse.stride(0);
  params.lse_row = lse.stride(1);
  params.lse_head = lse.stride(2);
  params.seqs.b = static_cast<int32_t>(b);
  params.seqs.sq = static_cast<int32_t>(s);
  params.num_splits = static_cast<int32_t>(parts.size(0));
  params.hq = static_cast<int32_t>(h);
  params.dv = static_cast<int32_t>(parts.size(4));
  const int device = device_of(parts);
  run_or_throw(name, flash_combine(device, current_stream(device), FLASH_BF16, &params));
  return {without_padding(std::move(out), out_partial.size(-1)), std::move(lse)};
}

}  // namespace flash::shim
