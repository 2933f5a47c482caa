#include "host/tensor_maps.h"

#include "device/sm90/config.h"
#include "host/api.h"

namespace flash::host {

namespace {

// Values of cuda.h.
enum : int { kFloat16 = 6, kBfloat16 = 9 };
enum : int { kNotInterleaved = 0, kSwizzle128 = 3, kFillZeros = 0 };
// Bytes that L2 fetches from memory at least.
enum Promotion : int { kPromote128 = 2, kPromote256 = 3 };

constexpr uint32_t kBoxCols = 64;  // 128 bytes, the width of the swizzle
constexpr int kElementBytes = 2;   // of a map: two neighbours of 8 bits are one element
constexpr float kLog2e = 1.44269504f;

struct Extent {
  int64_t cols, rows, heads, batch;
};

struct Extents {
  Extent q, k, v, o;
};

// A packed operand is one long sequence: kernels add where theirs begins.
template <class Params>
Extents extents_of(const Params& params, int64_t rows_of_cache) {
  const Sequences& seqs = params.seqs;
  Extent q = {params.d, seqs.sq, params.hq, seqs.b};
  if (seqs.cu_seqlens_q != nullptr) q = {params.d, seqs.total_q, params.hq, 1};
  Extent k = {params.d, seqs.sk, params.hk, rows_of_cache};
  if (seqs.block_table != nullptr) {
    k = {params.d, seqs.page_size, params.hk, seqs.num_pages};
  } else if (seqs.cu_seqlens_k != nullptr) {
    k = {params.d, seqs.total_k, params.hk, 1};
  }
  Extents all = {q, k, k, q};
  all.v.cols = all.o.cols = params.dv;
  return all;
}

bool has_map(const Rows& x, const Extent& extent, int element_bytes = kElementBytes) {
  const auto is_right = [element_bytes](int64_t size, int64_t stride) {
    constexpr int64_t kMostElements = int64_t{1} << 39;
    return size <= 1 || (stride > 0 && stride * element_bytes % 16 == 0 && stride < kMostElements);
  };
  if (x.ptr == nullptr) return true;
  return reinterpret_cast<uintptr_t>(x.ptr) % 16 == 0 && is_right(extent.rows, x.row) &&
         is_right(extent.heads, x.head) && is_right(extent.batch, x.batch);
}

// `box_rows` rows of one panel are one copy; those of several heads, one behind the other.
bool make_map(const Rows& x, const Extent& extent, int box_rows, int dtype, TensorMap* map,
              Promotion promotion = kPromote256, int element_bytes = kElementBytes,
              int box_heads = 1) {
  const auto dim = [](int64_t size) { return static_cast<uint64_t>(size < 1 ? 1 : size); };
  const uint64_t dims[] = {dim(extent.cols * element_bytes / kElementBytes), dim(extent.rows),
                           dim(extent.heads), dim(extent.batch)};
  // Of a dimension of one, the stride is never used, and may be one that the driver refuses.
  const auto bytes = [element_bytes](uint64_t size, int64_t stride) {
    return size == 1 ? uint64_t{16} : static_cast<uint64_t>(element_bytes * stride);
  };
  const uint64_t strides[] = {bytes(dims[1], x.row), bytes(dims[2], x.head),
                              bytes(dims[3], x.batch)};
  const uint32_t box[] = {kBoxCols, static_cast<uint32_t>(box_rows / box_heads),
                          static_cast<uint32_t>(box_heads), 1};
  const uint32_t steps[] = {1, 1, 1, 1};
  return check(driver()->cuTensorMapEncodeTiled(map, dtype == FLASH_BF16 ? kBfloat16 : kFloat16, 4,
                                                x.ptr, dims, strides, box, steps, kNotInterleaved,
                                                kSwizzle128, promotion, kFillZeros),
               "cuTensorMapEncodeTiled");
}

}  // namespace

bool have_tensor_maps(const ForwardParams& params, int element_bytes) {
  const Extents all = extents_of(params, params.seqs.cache_rows);
  return has_map(params.q, all.q, element_bytes) && has_map(params.qv, all.o) &&
         has_map(params.k, all.k, element_bytes) && has_map(params.v, all.v, element_bytes) &&
         has_map(params.o, all.o);
}

bool have_tensor_maps(const BackwardParams& params) {
  const Extents all = extents_of(params, params.seqs.b);
  return has_map(params.q, all.q) && has_map(params.k, all.k) && has_map(params.v, all.v) &&
         has_map(params.dout, all.o) && has_map(params.dk, all.k) && has_map(params.dv_grad, all.v);
}

bool make_tma_params(const ForwardParams& params, const Shape& shape, int dtype, bool is_paired,
                     TmaForwardParams* made) {
  const Extents all = extents_of(params, params.seqs.cache_rows);
  made->call = params;
  made->scale_log2 = params.scores.softmax_scale * kLog2e;
  const int bytes = shape.element_bytes;
  const int rows = params.seqs.block_table == nullptr
                       ? shape.block_n / (is_paired ? 2 : 1)
                       : sm90::rows_of_piece(params.seqs.page_size, shape.block_n);
  const int heads = params.heads_of_tile;
  return make_map(params.q, all.q, shape.box_m, dtype, &made->q, kPromote128, bytes, heads) &&
         make_map(params.k, all.k, rows, dtype, &made->k, kPromote128, bytes) &&
         make_map(params.v, all.v, rows, dtype, &made->v, kPromote128, bytes) &&
         make_map(params.o, all.o, shape.box_m, dtype, &made->o, kPromote256, kElementBytes, heads);
}

bool make_tma_params(const ForwardParams& params, const Shape& shape, int dtype,
                     TmaLatentParams* made) {
  const Extent qv = extents_of(params, params.seqs.cache_rows).o;
  return make_tma_params(params, shape, dtype, false, &made->all) &&
         (params.qv.ptr == nullptr || make_map(params.qv, qv, shape.box_m, dtype, &made->qv,
                                               kPromote128, kElementBytes, params.heads_of_tile));
}

bool make_tma_params(const BackwardParams& params, const Shape& shape, int dtype,
                     TmaBackwardParams* made) {
  const Extents all = extents_of(params, params.seqs.b);
  made->call = params;
  made->scale_log2 = params.scores.softmax_scale * kLog2e;
  made->lse_factor = -1.0f / made->scale_log2;
  return make_map(params.q, all.q, shape.block_m, dtype, &made->q) &&
         make_map(params.k, all.k, shape.block_n, dtype, &made->k) &&
         make_map(params.v, all.v, shape.block_n, dtype, &made->v) &&
         make_map(params.dout, all.o, shape.block_m, dtype, &made->dout) &&
         make_map(params.dk, all.k, shape.box_m, dtype, &made->dk) &&
         make_map(params.dv_grad, all.v, shape.box_m, dtype, &made->dv);
}

}  // namespace flash::host
