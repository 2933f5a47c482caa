// Argument rules. flash_attn/_checks.py holds the same ones for calls that pass through Python;
// tests/build_tools/test_shim.py compares the two, message for message.
#include <cmath>
#include <initializer_list>

#include "torch/messages.h"

namespace flash::shim {

namespace {

// FP8 keys and values go with queries of every dtype in calls that have no gradients.
void check_dtypes(const char* name, const Tensor& q, const Tensor& k, const Tensor& v,
                  bool takes_fp8_keys) {
  if (q.dtype() != Dtype::kHalf && q.dtype() != Dtype::kBfloat16 && q.dtype() != Dtype::kE4m3) {
    fail(name, "FlashAttention only support fp16 and bf16 data type", "q of " + dtype_text(q));
  }
  if (takes_fp8_keys && k.dtype() == Dtype::kE4m3) {
    if (v.dtype() == k.dtype()) return;
    fail(name, "key and value must have the same dtype",
         "k " + dtype_text(k) + ", v " + dtype_text(v));
  }
  if (k.dtype() != q.dtype()) {
    fail(name, "query and key must have the same dtype",
         "q " + dtype_text(q) + ", k " + dtype_text(k));
  }
  if (v.dtype() != q.dtype()) {
    fail(name, "query and value must have the same dtype",
         "q " + dtype_text(q) + ", v " + dtype_text(v));
  }
}

struct Named {
  const char* argument;
  const Tensor& x;
};

void check_devices(const char* name, const Tensor& q, std::initializer_list<Named> others) {
  for (const Named& other : others) {
    if (!other.x) continue;
    if (other.x.device_type() != q.device_type() || other.x.device_index() != q.device_index()) {
      const bool is_same_type = other.x.device_type() == q.device_type();
      fail(name,
           std::string(other.argument) + " must be on " + device_text(q) + ", the device of q",
           is_same_type ? device_text(other.x) : "another kind of device");
    }
  }
}

void check_side_devices(const char* name, const Tensor& q, const Lengths& lengths,
                        const Scoring& scores) {
  check_devices(name, q,
                {{"cu_seqlens_q", lengths.cu_seqlens_q},
                 {"cu_seqlens_k", lengths.cu_seqlens_k},
                 {"seqused_q", lengths.seqused_q},
                 {"seqused_k", lengths.seqused_k},
                 {"leftpad_k", lengths.leftpad_k},
                 {"block_table", lengths.block_table},
                 {"cache_batch_idx", lengths.kv_batch_idx},
                 {"alibi_slopes", scores.alibi_slopes},
                 {"rng_state", scores.rng_state}});
}

void check_rank(const char* name, const char* argument, const Tensor& x, bool is_packed) {
  if (x.dim() == (is_packed ? 3 : 4)) return;
  const std::string lead = is_packed ? "total" : "batch_size, seqlen";
  fail(name, std::string(argument) + " must have shape (" + lead + ", num_heads, head_size)",
       "shape " + shape_text(x));
}

void check_shapes(const char* name, const Tensor& q, const Tensor& k, const Tensor& v,
                  bool is_packed_q, bool is_packed_k) {
  check_rank(name, "q", q, is_packed_q);
  check_rank(name, "k", k, is_packed_k);
  check_rank(name, "v", v, is_packed_k);
  if (!is_packed_q && q.size(0) == 0) {
    fail(name, "batch size must be positive", "q of shape " + shape_text(q));
  }
  for (int64_t i = 0; i < k.dim() - 1; ++i) {
    if (v.size(i) != k.size(i)) {
      fail(name, "v must have the shape of k in all but the last dimension",
           "k " + shape_text(k) + ", v " + shape_text(v));
    }
  }
  if (q.size(-1) != k.size(-1)) {
    fail(name, "q and k must have the same head dimension",
         "q " + text(q.size(-1)) + ", k " + text(k.size(-1)));
  }
  const int64_t hq = q.size(-2);
  const int64_t hk = k.size(-2);
  if (hk == 0 || hq % hk != 0) {
    fail(name, "Number of heads in key/value must divide number of heads in query",
         "q with " + text(hq) + " heads, k with " + text(hk));
  }
}

void check_head_dims(const char* name, int64_t d, int64_t dv, const char* direction) {
  constexpr int64_t kMaxOfNarrow = 512;  // of V beside narrow q and k
  if (d > kWidest || dv > (d <= kNarrow ? kMaxOfNarrow : kWidest)) {
    fail(name,
         std::string("FlashAttention ") + direction + " only supports head dimension at most " +
             text(kWidest),
         "head dimension " + text(d) + " of q and k, " + text(dv) + " of v");
  }
  if (d == 0 || dv == 0) {
    fail_value(name, "head dimension must be positive",
               text(d) + " of q and k, " + text(dv) + " of v");
  }
}

void check_int32(const char* name, const char* argument, const Tensor& x) {
  if (x.dtype() != Dtype::kInt) {
    fail(name, std::string(argument) + " must have dtype int32", dtype_text(x));
  }
}

void check_vector(const char* name, const char* argument, const Tensor& x, int64_t length,
                  const char* words) {
  if (!x) return;
  check_int32(name, argument, x);
  check_shape(name, argument, x, {length}, words);
}

void check_cu_seqlens(const char* name, const char* argument, const Tensor& x) {
  if (!x) return;
  check_int32(name, argument, x);
  if (x.dim() != 1 || x.size(0) < 2) {
    fail(name, std::string(argument) + " must have shape (batch_size + 1)",
         "shape " + shape_text(x));
  }
}

void check_block_table(const char* name, const Tensor& k, const Lengths& lengths, int64_t b) {
  const Tensor& table = lengths.block_table;
  if (table.dtype() != Dtype::kInt) {
    fail(name, "block_table must have dtype torch.int32", dtype_text(table));
  }
  if (table.dim() != 2 || (!lengths.kv_batch_idx && table.size(0) != b)) {
    fail(name, "block_table must have shape (batch_size, max_num_blocks) = (" + text(b) + ", any)",
         "shape " + shape_text(table));
  }
  if (k.size(1) == 0) {
    fail(name, "Paged KV cache block size must be positive", "k of shape " + shape_text(k));
  }
}

void check_lengths(const char* name, const Tensor& q, const Tensor& k, const Lengths& lengths) {
  check_cu_seqlens(name, "cu_seqlens_q", lengths.cu_seqlens_q);
  check_cu_seqlens(name, "cu_seqlens_k", lengths.cu_seqlens_k);
  const int64_t b = lengths.cu_seqlens_q ? lengths.cu_seqlens_q.size(0) - 1 : q.size(0);
  check_vector(name, "cu_seqlens_k", lengths.cu_seqlens_k, b + 1, "(batch_size + 1)");
  check_vector(name, "seqused_q", lengths.seqused_q, b, "(batch_size)");
  check_vector(name, "seqused_k", lengths.seqused_k, b, "(batch_size)");
  check_vector(name, "leftpad_k", lengths.leftpad_k, b, "(batch_size)");
  check_vector(name, "cache_batch_idx", lengths.kv_batch_idx, b, "(batch_size)");
  if (lengths.block_table) {
    check_block_table(name, k, lengths, b);
  } else if (!lengths.cu_seqlens_k && !lengths.kv_batch_idx && k.size(0) != b) {
    fail(name, "q and k must have the same batch size",
         "q with " + text(b) + ", k with " + text(k.size(0)));
  }
}

void check_slopes(const char* name, const Tensor& slopes, int64_t b, int64_t hq) {
  if (slopes.dtype() != Dtype::kFloat) {
    fail(name, "ALiBi slopes must have dtype fp32", dtype_text(slopes));
  }
  if (!has_shape(slopes, {hq}) && !has_shape(slopes, {b, hq})) {
    fail(name,
         "alibi_slopes must have shape (num_heads) = (" + text(hq) +
             ",) or (batch_size, num_heads) = (" + text(b) + ", " + text(hq) + ")",
         "shape " + shape_text(slopes));
  }
}

void check_scores(const char* name, const Scoring& scores, int64_t b, int64_t hq) {
  if (!(scores.dropout_p >= 0.0 && scores.dropout_p < 1.0)) {
    fail_value(name, "dropout_p must lie in [0, 1)", number_text(scores.dropout_p));
  }
  if (!(scores.softcap >= 0.0 && std::isfinite(scores.softcap))) {
    fail_value(name, "softcap must be 0 (off) or positive", number_text(scores.softcap));
  }
  if (!std::isfinite(scores.softmax_scale)) {
    fail_value(name, "softmax_scale must be finite", number_text(scores.softmax_scale));
  }
  if (scores.softcap > 0.0 && scores.dropout_p > 0.0) {
    fail(name, "Softcapping does not support dropout for now",
         "softcap " + number_text(scores.softcap) + ", dropout_p " + number_text(scores.dropout_p));
  }
  if (scores.mask.chunk < 0) {
    fail_value(name, "attention_chunk must be 0 (off) or positive", text(scores.mask.chunk));
  }
  if (scores.alibi_slopes) check_slopes(name, scores.alibi_slopes, b, hq);
  const Tensor& state = scores.rng_state;
  if (scores.dropout_p > 0.0 && !state) {
    fail_value(name, "rng_state of the forward pass must be given when dropout_p > 0", "None");
  }
  if (state && (state.dtype() != Dtype::kLong || !has_shape(state, {2}))) {
    fail_value(name, "rng_state must be 2 int64 values",
               dtype_text(state) + " of shape " + shape_text(state));
  }
}

void check_new_rows(const Forward& call, const char* argument, const Tensor& rows,
                    const Tensor& cache) {
  const char* name = call.name;
  const bool is_packed = static_cast<bool>(call.append.cu_seqlens);
  const int64_t h = cache.size(2);
  const int64_t last = cache.size(3);
  if (rows.dim() != (is_packed ? 3 : 4)) {
    const std::string lead = is_packed ? "total_k_new" : "batch_size, seqlen_new";
    fail(name, std::string(argument) + " must have shape (" + lead + ", num_heads_k, head_size)",
         "shape " + shape_text(rows));
  }
  const Tensor& k = call.append.k;
  if (is_packed) {
    check_shape(name, argument, rows, {k.size(0), h, last}, "(of the new rows)");
  } else {
    check_shape(name, argument, rows, {call.batch_size(), k.size(1), h, last}, "(of the new rows)");
  }
  if (rows.dtype() != cache.dtype()) {
    const std::string other = call.is_fp8() ? "the cache" : "query";
    fail(name, std::string(argument) + " must have the same dtype as " + other,
         dtype_text(rows) + ", " + dtype_text(cache));
  }
}

void check_rotary(const Forward& call) {
  const char* name = call.name;
  const Tensor& cos = call.append.rotary_cos;
  const Tensor& sin = call.append.rotary_sin;
  if (static_cast<bool>(cos) != static_cast<bool>(sin)) {
    fail(name, "rotary_cos and rotary_sin must be given together",
         std::string("rotary_cos ") + (cos ? "given" : "None") + ", rotary_sin " +
             (sin ? "given" : "None"));
  }
  if (!cos) return;
  if (call.is_fp8()) {
    fail(name, "FP8 keys are not rotated: rotate them, and the queries, before they are scaled",
         "rotary_cos and k of " + dtype_text(call.k));
  }
  for (const Named& table : {Named{"rotary_cos", cos}, Named{"rotary_sin", sin}}) {
    if (table.x.dtype() != call.q.dtype()) {
      fail(name, std::string(table.argument) + " must have the same dtype as query",
           dtype_text(table.x) + ", q " + dtype_text(call.q));
    }
  }
  if (cos.dim() != 2 || !has_shape(sin, {cos.size(0), cos.size(1)})) {
    fail(name, "rotary_cos and rotary_sin must have shape (seqlen_ro, rotary_dim / 2)",
         "shapes " + shape_text(cos) + " and " + shape_text(sin));
  }
  if (cos.size(0) == 0) {
    fail_value(name, "rotary_cos must have a position", "shape " + shape_text(cos));
  }
  const int64_t rotary_dim = 2 * cos.size(1);
  if (rotary_dim > call.q.size(-1)) {
    fail(name, "rotary_dim must be <= headdim",
         text(rotary_dim) + ", headdim " + text(call.q.size(-1)));
  }
  if (rotary_dim % 16 != 0) {
    fail(name, "Only rotary dimensions divisible by 16 are currently supported",
         "rotary_dim " + text(rotary_dim));
  }
}

void check_append(const Forward& call) {
  const char* name = call.name;
  const Append& append = call.append;
  if (call.lengths.cu_seqlens_k) {
    fail(name, "new keys go into a cache, so cu_seqlens_k must be None", "a cu_seqlens_k");
  }
  check_new_rows(call, "k", append.k, call.k);
  check_new_rows(call, "v", append.v, call.v);
  check_devices(name, call.q,
                {{"k", append.k},
                 {"v", append.v},
                 {"cu_seqlens_k_new", append.cu_seqlens},
                 {"rotary_cos", append.rotary_cos},
                 {"rotary_sin", append.rotary_sin},
                 {"rotary_seqlens", append.rotary_seqlens}});
  if (!call.lengths.seqused_k) {
    fail(name, "If key is supplied, seqlens_k must also be passed in", "cache_seqlens None");
  }
  const int64_t b = call.batch_size();
  check_vector(name, "cu_seqlens_k_new", append.cu_seqlens, b + 1, "(batch_size + 1)");
  check_vector(name, "rotary_seqlens", append.rotary_seqlens, b, "(batch_size)");
  int64_t capacity = call.k.size(1);
  if (call.lengths.block_table) capacity *= call.lengths.block_table.size(1);
  if (!append.cu_seqlens && append.k.size(1) > capacity) {
    fail(name, "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
         "k with " + text(append.k.size(1)) + " rows, a cache of " + text(capacity));
  }
  check_rotary(call);
}

void check_grad(const char* name, const char* argument, const Tensor& grad, const Tensor& x) {
  if (!grad) return;
  const std::string like(argument + 1);
  const std::string words = "(like " + like + ")";
  if (x.dim() == 3) {
    check_shape(name, argument, grad, {x.size(0), x.size(1), x.size(2)}, words.c_str());
  } else {
    check_shape(name, argument, grad, {x.size(0), x.size(1), x.size(2), x.size(3)}, words.c_str());
  }
  if (grad.dtype() != x.dtype() || grad.device_index() != x.device_index()) {
    fail(name, std::string(argument) + " must have the dtype and device of " + like,
         dtype_text(grad) + ", " + dtype_text(x));
  }
}

}  // namespace

void fail(const char* name, const std::string& rule, const std::string& got) {
  throw std::runtime_error(std::string(name) + ": " + rule + "; got " + got);
}

void fail_value(const char* name, const std::string& rule, const std::string& got) {
  throw std::invalid_argument(std::string(name) + ": " + rule + "; got " + got);
}

std::string shape_text(const Tensor& x) {
  std::string words = "(";
  for (int64_t i = 0; i < x.dim(); ++i) words += (i == 0 ? "" : ", ") + text(x.size(i));
  return words + (x.dim() == 1 ? ",)" : ")");
}

void check(const Forward& call) {
  const char* name = call.name;
  check_dtypes(name, call.q, call.k, call.v, true);
  check_devices(name, call.q, {{"k", call.k}, {"v", call.v}});
  check_side_devices(name, call.q, call.lengths, call.scores);
  check_devices(name, call.q,
                {{"qv", call.qv},
                 {"q_descale", call.descale.q},
                 {"k_descale", call.descale.k},
                 {"v_descale", call.descale.v},
                 {"out", call.out}});
  check_shapes(name, call.q, call.k, call.v, call.is_packed_q(), call.is_packed_k());
  check_head_dims(name, call.q.size(-1), call.v.size(-1), "forward");
  check_lengths(name, call.q, call.k, call.lengths);
  check_scores(name, call.scores, call.batch_size(), call.q.size(-2));
  if (call.append.k) check_append(call);
  if (call.return_softmax && call.scores.dropout_p == 0.0) {
    fail(name, "return_softmax is only supported when p_dropout > 0.0", "p_dropout 0.0");
  }
  check_latent(call);
  check_fa3(call);
}

void check(const Backward& call) {
  const char* name = call.name;
  const Tensor& q = call.q;
  check_dtypes(name, q, call.k, call.v, false);
  if (q.dtype() == Dtype::kE4m3) {
    fail(name, "FP8 inputs have no backward", "q of " + dtype_text(q));
  }
  check_devices(name, q,
                {{"k", call.k},
                 {"v", call.v},
                 {"dout", call.dout},
                 {"out", call.out},
                 {"softmax_lse", call.softmax_lse}});
  check_side_devices(name, q, call.lengths, call.scores);
  check_shapes(name, q, call.k, call.v, call.is_packed(),
               static_cast<bool>(call.lengths.cu_seqlens_k));
  check_head_dims(name, q.size(-1), call.v.size(-1), "backward");
  check_lengths(name, q, call.k, call.lengths);
  check_scores(name, call.scores, call.batch_size(), q.size(-2));
  check_sm_margin(name, call.sm_margin);
  for (const Named& x : {Named{"dout", call.dout}, Named{"out", call.out}}) {
    check_like_q(name, x.argument, x.x, q, call.v.size(-1));
    if (x.x.dtype() != q.dtype()) {
      fail(name, std::string("query and ") + x.argument + " must have the same dtype",
           dtype_text(q) + ", " + dtype_text(x.x));
    }
  }
  check_grad(name, "dq", call.dq, q);
  check_grad(name, "dk", call.dk, call.k);
  check_grad(name, "dv", call.dv, call.v);
  constexpr const char* kWords = "(b, hq, sq) or (hq, total_q)";
  if (call.is_packed()) {
    check_shape(name, "softmax_lse", call.softmax_lse, {q.size(1), q.size(0)}, kWords);
  } else {
    check_shape(name, "softmax_lse", call.softmax_lse, {q.size(0), q.size(2), q.size(1)}, kWords);
  }
  if (call.softmax_lse.dtype() != Dtype::kFloat) {
    fail(name, "softmax_lse must have dtype torch.float32", dtype_text(call.softmax_lse));
  }
}

}  // namespace flash::shim
