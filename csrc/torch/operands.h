// Tensors made fit for the kernels, and the parameter structs' view of them.
#pragma once

#include "host/api.h"
#include "torch/call.h"

namespace flash::shim {

// Elements of `x` in 16 bytes.
int64_t chunk_of(const Tensor& x);

// Contiguous and uninitialised. `sizes` ends with the last dimension.
Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype, const Tensor& like);

// Shape of `x` with another last dimension.
Tensor empty_like_rows(const Tensor& x, int64_t last);
Tensor empty_like_rows(const Tensor& x, int64_t last, Dtype dtype);

// Whether kernels can read rows in 16-byte pieces: every row starts at a multiple of 16 bytes, its
// elements stand together, and so many make a row.
bool is_aligned(const Tensor& x);

// Whether a dimension repeats the same elements: one that was expanded.
bool repeats_rows(const Tensor& x);

// A copy that is aligned, its head dim padded with zeros; none where `x` is.
Tensor aligned_copy(const Tensor& x);

// `x` itself, or its aligned copy.
Tensor aligned(const Tensor& x);

// An int32, int64 or float table as the kernels read it: without gaps.
Tensor contiguous(const Tensor& x);

// The result in the caller's terms: `x` without the padding of its last dimension.
Tensor without_padding(Tensor x, int64_t last);

// What kernels write: the caller's tensor where they can, else one in its place.
class Written {
 public:
  // A new result. `given` may be none; the tensor in its place is uninitialised and has the rows of
  // `q`, with `last` elements each, padded as operands of q's dtype are; bf16 where that is FP8.
  Written(const Tensor& given, const Tensor& q, int64_t last);

  // A tensor that is written in part; the one in its place is a copy.
  explicit Written(const Tensor& given);

  const Tensor& tensor() const { return made_ ? made_ : given_; }

  // Copies to the caller's tensor where another stood in its place.
  void finish();

  // The result, without padding: the caller's tensor, or the one that stood in its place.
  Tensor result(int64_t last);

 private:
  const Tensor& given_;
  Tensor made_;  // none where the caller's is written
};

int64_t round_up(int64_t x, int64_t step);

// An operand (b, s, h, d) or (total, h, d); none gives a null pointer.
Rows rows_of(const Tensor& x);

int dtype_of(const Tensor& x);

// Drawn from torch's generator if dropout asks for it; else uninitialised and unused.
Tensor make_rng_state(const Tensor& q, double dropout_p);

// Factors (b, hk); none gives a null pointer.
Factors factors_of(const Tensor& x);

Scores scores_of(const Scoring& scoring, int64_t hq);

// Lengths for the kernels; `k` decides about pages.
Sequences sequences_of(const Lengths& lengths, const Tensor& q, const Tensor& k, int64_t b);

// Tables of a call that are not contiguous, made so in place.
void tidy(Lengths* lengths, Scoring* scoring);

template <class T>
T* pointer(const Tensor& x) {
  return x ? static_cast<T*>(x.data()) : nullptr;
}

// Throws what the host library says about a call that failed.
void run_or_throw(const char* name, int status);

// The device's ordinal. Only tests see tensors without one: they run on CPU memory with a driver of
// their own.
inline int device_of(const Tensor& x) { return x.device_index() < 0 ? 0 : x.device_index(); }

}  // namespace flash::shim
