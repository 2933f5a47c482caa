#include "torch/operands.h"

#include <algorithm>
#include <climits>
#include <cmath>

namespace flash::shim {

namespace {

constexpr int64_t kMaxDims = 5;

Tensor make_empty(const int64_t* sizes, int64_t dim, Dtype dtype, const Tensor& like) {
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, dim, dtype, like);
}

int32_t narrow(int64_t x) {
  return static_cast<int32_t>(x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : x);
}

// One side of a window. Beyond the longest sequence it bounds nothing, and row plus bound must not
// overflow.
int32_t narrow_window(int64_t x) { return narrow(std::min<int64_t>(x, 1 << 30)); }

// The leading part of each row of `x`.
Tensor head_of_rows(const Tensor& x, int64_t last) {
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  for (int64_t i = 0; i < x.dim(); ++i) {
    sizes[i] = x.size(i);
    strides[i] = x.stride(i);
  }
  sizes[x.dim() - 1] = last;
  return view(x, sizes, strides, x.dim());
}

bool is_contiguous(const Tensor& x) {
  int64_t stride = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    if (x.size(i) > 1 && x.stride(i) != stride) return false;
    stride *= x.size(i);
  }
  return true;
}

}  // namespace

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype, const Tensor& like) {
  return make_empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, like);
}

Tensor empty_like_rows(const Tensor& x, int64_t last, Dtype dtype) {
  int64_t sizes[kMaxDims];
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  sizes[x.dim() - 1] = last;
  return make_empty(sizes, x.dim(), dtype, x);
}

Tensor empty_like_rows(const Tensor& x, int64_t last) {
  return empty_like_rows(x, last, x.dtype());
}

int64_t chunk_of(const Tensor& x) { return x.dtype() == Dtype::kE4m3 ? 16 : 8; }

bool is_aligned(const Tensor& x) {
  const int64_t chunk = chunk_of(x);
  if (x.size(-1) % chunk != 0 || x.stride(-1) != 1) return false;
  for (int64_t i = 0; i < x.dim() - 1; ++i) {
    if (x.size(i) > 1 && x.stride(i) % chunk != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
}

bool repeats_rows(const Tensor& x) {
  for (int64_t i = 0; i < x.dim() - 1; ++i) {
    if (x.size(i) > 1 && x.stride(i) == 0) return true;
  }
  return false;
}

Tensor aligned_copy(const Tensor& x) {
  if (is_aligned(x)) return Tensor();
  const int64_t last = round_up(x.size(-1), chunk_of(x));
  Tensor copied = empty_like_rows(x, last);
  if (last == x.size(-1)) {
    copy(copied, x);
  } else {
    zero(copied);
    copy(head_of_rows(copied, x.size(-1)), x);
  }
  return copied;
}

Tensor aligned(const Tensor& x) {
  Tensor copied = aligned_copy(x);
  return copied ? std::move(copied) : x.share();
}

Tensor contiguous(const Tensor& x) {
  if (is_contiguous(x)) return x.share();
  Tensor copied = empty_like_rows(x, x.size(-1));
  copy(copied, x);
  return copied;
}

Tensor without_padding(Tensor x, int64_t last) {
  if (x.size(-1) == last) return x;
  Tensor copied = empty_like_rows(x, last);
  copy(copied, head_of_rows(x, last));
  return copied;
}

Written::Written(const Tensor& given, const Tensor& q, int64_t last) : given_(given) {
  const Dtype dtype = q.dtype() == Dtype::kE4m3 ? Dtype::kBfloat16 : q.dtype();
  const int64_t padded = round_up(last, chunk_of(q));
  const bool is_direct = given && given.dtype() == dtype && padded == last && is_aligned(given);
  if (!is_direct) made_ = empty_like_rows(q, padded, dtype);
}

Written::Written(const Tensor& given) : given_(given), made_(aligned_copy(given)) {}

void Written::finish() {
  if (given_ && made_) copy(given_, head_of_rows(made_, given_.size(-1)));
}

Tensor Written::result(int64_t last) {
  return given_ ? given_.share() : without_padding(std::move(made_), last);
}

Rows rows_of(const Tensor& x) {
  if (!x) return {};
  const int64_t batch = x.dim() == 4 ? x.stride(0) : 0;
  return {x.data(), batch, x.stride(-3), x.stride(-2)};
}

int dtype_of(const Tensor& x) {
  const Dtype dtype = x.dtype();
  return dtype == Dtype::kE4m3 ? FLASH_E4M3 : dtype == Dtype::kBfloat16 ? FLASH_BF16 : FLASH_FP16;
}

Tensor make_rng_state(const Tensor& q, double dropout_p) {
  Tensor state = empty({2}, Dtype::kLong, q);
  if (dropout_p > 0.0) draw(state);
  return state;
}

Factors factors_of(const Tensor& x) {
  if (!x) return {};
  return {static_cast<const float*>(x.data()), x.stride(0), x.stride(1)};
}

Scores scores_of(const Scoring& scoring, int64_t hq) {
  Scores scores = {};
  scores.softmax_scale = static_cast<float>(scoring.softmax_scale);
  scores.softcap = static_cast<float>(scoring.softcap);
  scores.window_left = narrow_window(scoring.mask.left);
  scores.window_right = narrow_window(scoring.mask.right);
  scores.attention_chunk = narrow(scoring.mask.chunk);
  scores.alibi_slopes = pointer<const float>(scoring.alibi_slopes);
  scores.alibi_batch_stride = scoring.alibi_slopes && scoring.alibi_slopes.dim() == 2 ? hq : 0;
  scores.keep_scale = 1.0f;
  scores.keep_threshold = 255;
  if (scoring.dropout_p > 0.0) {
    scores.rng_state = pointer<const int64_t>(scoring.rng_state);
    scores.keep_scale = static_cast<float>(1.0 / (1.0 - scoring.dropout_p));
    scores.keep_threshold = static_cast<uint32_t>(std::floor((1.0 - scoring.dropout_p) * 255.0));
  }
  return scores;
}

Sequences sequences_of(const Lengths& lengths, const Tensor& q, const Tensor& k, int64_t b) {
  Sequences seqs = {};
  seqs.cu_seqlens_q = pointer<const int32_t>(lengths.cu_seqlens_q);
  seqs.cu_seqlens_k = pointer<const int32_t>(lengths.cu_seqlens_k);
  seqs.seqused_q = pointer<const int32_t>(lengths.seqused_q);
  seqs.seqused_k = pointer<const int32_t>(lengths.seqused_k);
  seqs.leftpad_k = pointer<const int32_t>(lengths.leftpad_k);
  seqs.kv_batch_idx = pointer<const int32_t>(lengths.kv_batch_idx);
  seqs.b = narrow(b);
  seqs.sq = narrow(lengths.cu_seqlens_q ? lengths.max_seqlen_q.value_or(q.size(0)) : q.size(1));
  seqs.total_q = narrow(q.size(0));
  seqs.total_k = INT32_MAX;  // of pages, the block table knows
  seqs.cache_rows = narrow(lengths.block_table ? lengths.block_table.size(0) : k.size(0));
  if (lengths.block_table) {
    const Tensor& table = lengths.block_table;
    seqs.block_table = pointer<const int32_t>(table);
    seqs.block_table_stride = table.stride(0);
    seqs.page_size = narrow(k.size(1));
    seqs.num_pages = narrow(k.size(0));
    const int64_t capacity = table.size(1) * k.size(1);
    seqs.sk = narrow(std::min(capacity, lengths.max_seqlen_k.value_or(capacity)));
  } else if (lengths.cu_seqlens_k) {
    seqs.sk = narrow(lengths.max_seqlen_k.value_or(k.size(0)));
    seqs.total_k = narrow(k.size(0));
  } else {
    seqs.sk = narrow(k.size(1));
  }
  return seqs;
}

void tidy(Lengths* lengths, Scoring* scoring) {
  for (Tensor* x : {&lengths->cu_seqlens_q, &lengths->cu_seqlens_k, &lengths->seqused_q,
                    &lengths->seqused_k, &lengths->leftpad_k, &lengths->block_table,
                    &lengths->kv_batch_idx, &scoring->alibi_slopes, &scoring->rng_state}) {
    if (*x && !is_contiguous(*x)) *x = contiguous(*x);
  }
}

void run_or_throw(const char* name, int status) {
  if (status == 0) throw std::runtime_error(std::string(name) + ": " + flash_last_error());
}

}  // namespace flash::shim
