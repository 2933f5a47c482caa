#include "host/families.h"

#include "device/common/config.h"
#include "device/decode/config.h"
#include "device/sm80/config.h"
#include "device/sm90/config.h"
#include "host/api.h"
#include "host/tensor_maps.h"

namespace flash::host {

namespace {

// Scores go to softmax as they are.
bool is_plain(const Scores& scores) {
  return scores.softcap == 0.0f && scores.alibi_slopes == nullptr && scores.softmax_scale > 0.0f;
}

// Tensors without rows have no tensor maps.
bool has_rows(const Sequences& seqs) {
  return seqs.sq > 0 && seqs.sk > 0 && (seqs.cu_seqlens_q == nullptr || seqs.total_q > 0) &&
         (seqs.cu_seqlens_k == nullptr || seqs.total_k > 0);
}

bool is_decode(int family) { return family == kDecode || family == kDecodeWide; }

// Rows of a decode kernel's tile.
int rows_of(int family) { return family == kDecode ? 16 : 64; }

bool is_hopper(int family) { return family >= kSm90Wide && family <= kSm90Latent; }

int element_bytes(int family) { return family >= kSm90Fp8Wide && family <= kSm90Fp8Scored ? 1 : 2; }

// Of a kernel that waits by itself for the one in front.
Shape waiting(Shape shape) {
  shape.waits = true;
  return shape;
}

sm90::ForwardTile forward_tile(int family, int head_dim) {
  const bool is_wide = family == kSm90Wide || family == kSm90Fp8Wide;
  const bool is_plain = family == kSm90 || family == kSm90Fp8;
  const sm90::Serves serves = is_wide                 ? sm90::kLong
                              : family == kSm90Narrow ? sm90::kNarrow
                              : is_plain              ? sm90::kPlain
                                                      : sm90::kAll;
  return sm90::forward_tile(serves, head_dim, element_bytes(family));
}

Shape shape_of_hopper(int family, int kind, int head_dim) {
  if (family == kSm90Latent) {
    const sm90::LatentTile tile = sm90::latent_tile(head_dim);
    Shape shape =
        waiting({tile.block_m(), tile.block_n(), tile.threads(), tile.smem_bytes(), sm90::kBoxM});
    shape.may_pair = true;
    return shape;
  }
  if (kind == FLASH_BACKWARD) {
    const sm90::BackwardTile tile = sm90::backward_tile(head_dim);
    Shape shape = waiting({tile.block_m, tile.block_n, tile.threads(), tile.smem_bytes(),
                           sm90::kBoxM, tile.share == sm90::kByKeys});
    shape.takes_blocks = tile.takes_blocks();
    return shape;
  }
  if (kind == FLASH_CONVERT) {
    Shape shape = waiting({sm90::kSumRows, 0, sm90::kConvertThreads, 0, 0, true});
    shape.ctas = sm90::kConvertCtas;
    return shape;
  }
  if (kind == FLASH_DQ) {
    const sm90::QueriesTile tile = sm90::queries_tile(head_dim);
    return waiting({tile.block_m(), tile.block_n, tile.threads(), tile.smem_bytes(), sm90::kBoxM});
  }
  const sm90::ForwardTile tile = forward_tile(family, head_dim);
  Shape shape =
      waiting({tile.block_m(), tile.block_n, tile.threads(), tile.smem_bytes(), sm90::kBoxM});
  shape.element_bytes = tile.element_bytes;
  shape.may_pair = tile.may_pair();
  return shape;
}

// V has fewer columns than Q and K, as few as kernels of its own have.
bool is_narrow(int d, int dv) { return d > sm90::kNarrowV && dv <= sm90::kNarrowV; }

// A wide tile takes longer to begin and to end, has more rows that are empty, and more keys that a
// mask hides: it needs many steps between. A window leaves wider heads too few.
bool is_long(const ForwardParams& params) {
  const Sequences& seqs = params.seqs;
  const Scores& scores = params.scores;
  const int length = seqs.sq < seqs.sk ? seqs.sq : seqs.sk;
  const int width = wider(params.d, params.dv);
  const bool is_window = scores.window_left >= 0 || scores.attention_chunk != 0;
  const int least = (width <= 96 ? 2048 : 4096) * (has_mask(scores) ? 2 : 1);
  return length >= least && (width <= 64 || !is_window);
}

// The tiles of sm90 at head dim 64 are the largest of all: they need enough rows of a sequence, as
// long as they are on average, and enough tiles for two rounds of the device.
bool is_small(const ForwardParams& params, int num_sms) {
  const Sequences& seqs = params.seqs;
  const int rows = forward_tile(kSm90, 64).block_m();
  if (seqs.b == 0) return true;
  const int64_t length = seqs.cu_seqlens_q == nullptr ? seqs.sq : ceil_div(seqs.total_q, seqs.b);
  return length < rows || ceil_div(length, rows) * params.hq * seqs.b < 2 * num_sms;
}

}  // namespace

bool has_mask(const Scores& scores) {
  return scores.window_left >= 0 || scores.window_right >= 0 || scores.attention_chunk != 0;
}

bool has_whole_pieces(const Sequences& seqs) {
  return seqs.num_pages > 0 && seqs.page_size % sm90::kLeastPageRows == 0 &&
         seqs.leftpad_k == nullptr;
}

bool has_lengths(const Sequences& seqs) {
  return seqs.cu_seqlens_q != nullptr || seqs.cu_seqlens_k != nullptr ||
         seqs.seqused_q != nullptr || seqs.seqused_k != nullptr;
}

Shape shape_of(int family, int kind, int head_dim, int arch) {
  if (is_hopper(family)) return shape_of_hopper(family, kind, head_dim);
  switch (kind) {
    case FLASH_FORWARD: {
      const sm80::ForwardTile tile = sm80::forward_tile(head_dim, arch);
      return {tile.block_m, tile.block_n, tile.threads(), tile.smem_bytes(), 0};
    }
    case FLASH_BACKWARD:
    case FLASH_CONVERT: {
      const sm80::BackwardTile tile = sm80::backward_tile(head_dim, arch);
      const int smem_bytes = kind == FLASH_BACKWARD ? tile.smem_bytes() : 0;
      return {tile.block_m, tile.block_n, tile.threads(), smem_bytes, 0, true};
    }
    case FLASH_DECODE: {
      const decode::Tile tile = decode::tile(rows_of(family), head_dim, arch);
      return waiting({tile.rows, tile.block_n, tile.threads(), tile.smem_bytes(), 0, false,
                      tile.ctas, tile.merges_in_clusters()});
    }
    case FLASH_DELTA:
      return {common::kDeltaRows, 0, common::kDeltaThreads, 0, 0};
    case FLASH_COMBINE:
      return waiting({common::kCombineWarps, 0, common::kCombineThreads, 0, 0});
    case FLASH_APPEND:
      return {common::kAppendRows, 0, common::kAppendThreads, 0, 0};
    case FLASH_S_DMASK:
      return {common::kSDmaskRows, 0, common::kSDmaskThreads, 0, 0};
    default:
      return {common::kFillThreads, 0, common::kFillThreads, 0, 0};
  }
}

bool is_latent(const ForwardParams& params) { return params.has_qv != 0 || params.dv > kWidest; }

bool takes(int family, int head_dim, const ForwardParams& params, int num_sms) {
  const Sequences& seqs = params.seqs;
  if (is_latent(params) != (family == kSm90Latent)) return false;
  if (family == kSm90Latent) {
    return params.d <= sm90::LatentTile::kHeadDim && has_rows(seqs) &&
           params.scores.rng_state == nullptr && have_tensor_maps(params, 2);
  }
  if (is_decode(family)) {
    return params.scores.rng_state == nullptr && decode_rows(params) <= rows_of(family);
  }
  if (!is_hopper(family)) return true;
  if ((params.num_splits > 1 || params.heads_of_tile > 1) && family != kSm90Scored) return false;
  const bool is_scored = family == kSm90Scored || family == kSm90Fp8Scored;
  if (!is_scored && !is_plain(params.scores)) return false;
  if (family == kSm90Wide && !is_long(params)) return false;
  if (family == kSm90Narrow && !is_narrow(params.d, params.dv)) return false;
  if (family == kSm90 && params.d <= 64 && params.dv <= 64 && is_small(params, num_sms)) {
    return false;
  }
  // More keys at a time cost less, but more of the last ones are none. Heads of up to 96 have
  // kernels of their own.
  const int least_keys = has_mask(params.scores) ? 2048 : 1024;
  if (family == kSm90Fp8Wide && (seqs.sk < least_keys || wider(params.d, params.dv) <= 96)) {
    return false;
  }
  const bool takes_pages = forward_tile(family, head_dim).takes_pages();
  if (seqs.block_table != nullptr && !(takes_pages && has_whole_pieces(seqs))) return false;
  return has_rows(seqs) && params.scores.rng_state == nullptr &&
         have_tensor_maps(params, element_bytes(family));
}

bool takes(int family, const BackwardParams& params) {
  if (!is_hopper(family)) return true;
  if (family == kSm90Narrow && !is_narrow(params.d, params.dv)) return false;
  // Sums of scores begin with lse / scale, which must be finite.
  constexpr float kLeastScale = 1e-30f;
  if (is_plain(params.scores) && params.scores.softmax_scale < kLeastScale) return false;
  return has_rows(params.seqs) && params.scores.rng_state == nullptr && have_tensor_maps(params);
}

int64_t decode_rows(const ForwardParams& params) {
  return int64_t{params.hq / params.hk} * params.seqs.sq;
}

int most_decode_rows() { return rows_of(kDecodeWide); }

bool fits_decode(const ForwardParams& params) {
  return !is_latent(params) && params.scores.rng_state == nullptr &&
         decode_rows(params) <= most_decode_rows();
}

}  // namespace flash::host
