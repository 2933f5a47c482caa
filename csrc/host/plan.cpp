#include "host/plan.h"

#include "device/common/config.h"
#include "device/decode/config.h"
#include "device/sm90/config.h"
#include "host/numbers.h"

namespace flash::host {

namespace {

// Heads of a section: at most `most` of `heads`. Sections are of one size, because tiles run long
// first within a section: the long tiles of a short last one would leave most of the device idle.
int section(int64_t heads, int64_t most) {
  if (heads == 0) return 1;
  return clamp(ceil_div(heads, ceil_div(heads, most < 1 ? 1 : most)), 1, INT32_MAX);
}

// Tiles of the rows of a head, or of the heads that share tiles.
int64_t num_row_blocks(const ForwardParams& params, const Shape& shape) {
  return ceil_div(params.seqs.sq, queries_of_tile(params, shape));
}

int64_t num_tiles(const ForwardParams& params, const Shape& shape) {
  return num_row_blocks(params, shape) * (params.hq / params.heads_of_tile) * params.seqs.b;
}

// Multiprocessors that a call may take: at least one.
template <class Params>
int num_sms_for(const Params& params, const Device& device) {
  return clamp(int64_t{device.num_sms} - params.sm_margin, 1, device.num_sms);
}

int64_t num_key_blocks(const BackwardParams& params, const Shape& shape) {
  return ceil_div(params.seqs.sk, shape.block_n) * params.hk * params.seqs.b;
}

// Whether later rows see more keys.
bool grows(const Scores& scores) { return scores.window_right >= 0 && scores.window_left < 0; }

// Whether they see so many more that long tiles must be kept from the end. Else tiles of one head
// run side by side.
bool has_long_tiles(const ForwardParams& params) {
  return grows(params.scores) && params.seqs.sk < 8 * int64_t{params.seqs.sq};
}

}  // namespace

int queries_of_tile(const ForwardParams& params, const Shape& shape) {
  if (params.heads_of_tile == 1) return shape.block_m;
  const int consumers = shape.block_m / sm90::kBoxM;
  return consumers * (sm90::kBoxM / params.heads_of_tile);
}

bool is_paired(const ForwardParams& params, const Shape& shape, const Device& device) {
  const Sequences& seqs = params.seqs;
  if (is_latent(params)) {
    return shape.may_pair && num_sms_for(params, device) > 1 &&
           params.hq / params.hk / params.heads_of_tile % 2 == 0 &&
           (seqs.block_table == nullptr || has_whole_pieces(seqs));
  }
  return shape.may_pair && grows(params.scores) && num_sms_for(params, device) > 1 &&
         seqs.cu_seqlens_q == nullptr && seqs.block_table == nullptr && params.num_splits <= 1 &&
         params.heads_of_tile == 1 && ceil_div(seqs.sq, shape.block_m) % 2 == 0;
}

bool shares_tiles(const ForwardParams& params, const Shape& shape, const Device& device) {
  // CTAs that load by TMA have a multiprocessor to themselves.
  const int64_t tiles = num_tiles(params, shape) * params.num_splits;
  return shape.box_m > 0 && tiles > num_sms_for(params, device) &&
         tiles < int64_t{1} << kCounterBits;
}

int64_t num_ctas(const ForwardParams& params, const Shape& shape, const Device& device) {
  if (shape.box_m > 0 && params.next_tile != nullptr) {
    const int sms = num_sms_for(params, device);
    return is_paired(params, shape, device) ? sms / 2 * 2 : sms;
  }
  return num_tiles(params, shape) * params.num_splits;
}

int64_t num_shares(const ForwardParams& params, const Shape& shape, const Device& device) {
  if (params.num_splits == 0) {
    const int64_t all = int64_t{num_sms_for(params, device)} * shape.ctas;
    return params.cluster == 0 ? all : all / params.cluster * params.cluster;
  }
  return int64_t{params.num_splits} * params.hk * params.seqs.b;
}

void choose_clusters(ForwardParams* params, const Shape& shape, const Device& device,
                     const Clusters& clusters) {
  if (params->num_splits != 0 || params->seqs.b == 0) return;
  const bool is_one = params->seqs.b == 1;
  if (!is_one && !decode::many_have_clusters(shape.block_m)) return;
  const int64_t pairs = int64_t{params->hk} * params->seqs.b;
  const int64_t blocks = ceil_div(params->seqs.sk, shape.block_n);
  const int64_t all = int64_t{num_sms_for(*params, device)} * shape.ctas;
  int size = 2 * decode::kMostInCluster;
  for (const int held : clusters.count) {
    size /= 2;
    const int64_t count = held < all / size ? held : all / size;
    const int64_t of_pair = count / pairs;
    // Larger clusters leave less to merge in memory, and mostly some multiprocessors idle.
    const int few = is_one ? decode::few_blocks(params->hk * size) : decode::kFewBlocks;
    const bool are_few = blocks <= few * size;
    const bool fill_device = of_pair * pairs * size * 8 >= all * 7;
    if (of_pair == 0 || !(are_few || fill_device)) continue;
    if (is_one) {
      params->num_splits = size * (are_few ? 1 : clamp(ceil_div(blocks, size), 1, of_pair));
    } else if (!are_few && (of_pair > 1 || size > decode::kFewInCluster || count < all / size)) {
      // It might go without, and then all CTAs must run at once.
      continue;
    }
    params->cluster = size;
    return;
  }
}

namespace {

// Of so many keys those that a query sees, on average, or of queries those that see a key.
int64_t seen(const Scores& scores, int64_t rows) {
  if (scores.window_left >= 0 && scores.window_right >= 0) {
    const int64_t width = int64_t{scores.window_left} + scores.window_right + 1;
    return rows < width ? rows : width;
  }
  return has_mask(scores) ? rows / 2 : rows;
}

// Multiprocessors that are left to the conversion of dQ. A row is rounded in a time of its own, and
// computed in one that grows with the keys that it sees.
int num_converting(const BackwardParams& params, int num_sms) {
  const Sequences& seqs = params.seqs;
  const int64_t keys =
      seen(params.scores, seqs.cu_seqlens_k == nullptr ? seqs.sk : seqs.total_k / seqs.b);
  // So many keys take one multiprocessor.
  const int64_t of_one = params.d <= 64 ? 6144 : 4096;
  return clamp((of_one + keys / 2) / (keys < 1 ? 1 : keys), 0, num_sms / 8);
}

}  // namespace

int64_t num_ctas(const BackwardParams& params, const Shape& shape, const Device& device) {
  const int64_t blocks = num_key_blocks(params, shape);
  if (shape.box_m > 0) {
    const bool takes_blocks = shape.takes_blocks && params.next_block != nullptr;
    const int sms = num_sms_for(params, device);
    if (!takes_blocks || blocks <= sms) return blocks;
    return sms - (shape.makes_sums ? num_converting(params, sms) : 0);
  }
  return params.deterministic ? int64_t{params.dq_copies} * params.hk * params.seqs.b : blocks;
}

int64_t num_ctas_of_dq(const BackwardParams& params, const Shape& shape, const Device& device) {
  const int64_t blocks = ceil_div(params.seqs.sq, shape.block_m) * params.hq * params.seqs.b;
  const int sms = num_sms_for(params, device);
  if (shape.ctas > 0) return clamp(blocks, 0, sms * shape.ctas);
  const bool takes_blocks = shape.box_m > 0 && params.next_block != nullptr;
  return takes_blocks && blocks > sms ? sms : blocks;
}

int choose_heads_of_tile(const ForwardParams& params, const Shape& shape) {
  if (shape.box_m == 0 || shape.element_bytes != 2) return 1;
  if (params.scores.alibi_slopes != nullptr) return 1;
  const int group = params.hq / params.hk;
  int heads = group < sm90::kBoxM ? group : sm90::kBoxM;
  while (group % heads != 0) --heads;
  // Tiles for each head by itself, and for so many. Less than a quarter less costs more. Half of a
  // packed sequence's last tile is empty, or so: how long each is nobody knows here.
  const int consumers = is_latent(params) ? 1 : 2;
  const Sequences& seqs = params.seqs;
  const auto tiles_of = [&](int queries) -> int64_t {
    if (seqs.cu_seqlens_q == nullptr) return 2 * seqs.b * ceil_div(seqs.sq, queries);
    return 2 * ceil_div(seqs.total_q, queries) + seqs.b;
  };
  const int64_t apart = group * tiles_of(consumers * sm90::kBoxM);
  const int64_t together = group / heads * tiles_of(consumers * (sm90::kBoxM / heads));
  return 4 * together <= 3 * apart ? heads : 1;
}

namespace {

// Keys that some row of a tile sees, at most.
int64_t keys_of_tile(const ForwardParams& params, const Shape& shape) {
  const Scores& scores = params.scores;
  if (scores.window_left < 0 || scores.window_right < 0) return params.seqs.sk;
  const int64_t seen = int64_t{scores.window_left} + scores.window_right + shape.block_m;
  return seen < params.seqs.sk ? seen : params.seqs.sk;
}

// Parts into which the keys are cut so that a call with few rows still fills the device: as many as
// take the least time, of rounds of the device or of reading all keys, and of merging.
int choose_splits(const ForwardParams& params, const Shape& shape, const Device& device) {
  constexpr int64_t kMaxSplits = 128, kMostRounds = 8;
  // A microsecond's bytes of memory, of the device and of a CTA, and FLOPs of a CTA: narrow heads
  // have fewer beside an exponential, a latent's CTA waits for its two buffers, and the sm80 family
  // has a third of Hopper's. What a further kernel costs, and more parts than its warps have on
  // their way at once. Measured on an H100 (docs/kernels/sm90.md, latent.md).
  constexpr double kBytes = 2.4e6, kBytesOfCta = 32e3, kMerging = 3.0, kMergingMore = 0.7;
  constexpr int kFewParts = common::kPartsAtOnce * common::kCombineWarps;
  constexpr double kPartOfLatent = 0.1;  // us, however short
  const Sequences& seqs = params.seqs;
  const int64_t tiles = num_tiles(params, shape);
  const int sms = num_sms_for(params, device);
  const int64_t keys = keys_of_tile(params, shape);
  const int64_t blocks = ceil_div(keys, shape.block_n);
  const int64_t columns = wider(params.d, params.dv);
  const int64_t of_keys = is_latent(params) ? params.d + params.dv : 2 * columns;
  const int64_t multiplied = of_keys + (params.has_qv ? params.dv : 0);
  const bool has_few = columns <= 64 || is_latent(params);
  const double flops = shape.box_m == 0 ? 1.9e6 : has_few ? 4.1e6 : 5.6e6;
  const double block_us =
      2.0 * static_cast<double>(shape.block_m * shape.block_n * multiplied) / flops;
  const int64_t read = shape.element_bytes * of_keys * keys * params.hk * seqs.b;
  // A part is written and read.
  const int64_t moved = 2 * int64_t{sizeof(float)} * params.dv * params.hq * seqs.sq * seqs.b;
  const double part_us =
      static_cast<double>(moved) / kBytes + (is_latent(params) ? kPartOfLatent : 0.0);
  const auto time_of = [&](int64_t splits) {
    // To begin and to end a tile takes as long as a block.
    const int64_t steps = ceil_div(tiles * splits, sms) * (ceil_div(blocks, splits) + 1);
    const int64_t ctas = clamp(tiles * splits, 1, sms);
    const double bytes = kBytesOfCta * static_cast<double>(ctas);
    const double reading_us = static_cast<double>(read) / (bytes < kBytes ? bytes : kBytes);
    const double computing_us = static_cast<double>(steps) * block_us;
    const double merging_us =
        (splits > 1 ? kMerging + static_cast<double>(splits) * part_us : 0.0) +
        (splits > kFewParts ? kMergingMore : 0.0);
    return (computing_us > reading_us ? computing_us : reading_us) + merging_us;
  };
  const int64_t most = tiles == 0 ? 1 : clamp(kMostRounds * int64_t{sms} / tiles, 1, kMaxSplits);
  int chosen = 1;
  double best = time_of(1);
  for (int splits = 2; splits <= most && splits <= blocks; ++splits) {
    if (time_of(splits) < best) {
      best = time_of(splits);
      chosen = splits;
    }
  }
  // Sequences may be of unlike lengths: where each CTA would have one part, and that long, twice as
  // many let those with short ones take others. Of other kernels nobody has measured it.
  constexpr int64_t kManyBlocks = 32;
  const bool may_wait = is_latent(params) && has_lengths(seqs) && seqs.b > 1;
  const bool is_one_round = tiles * chosen <= sms;
  return may_wait && is_one_round && blocks >= 2 * chosen * kManyBlocks ? 2 * chosen : chosen;
}

}  // namespace

int splits_of(int wanted, const ForwardParams& params, const Shape& shape, const Device& device) {
  return wanted == 0 ? choose_splits(params, shape, device) : limit_splits(wanted, params, shape);
}

int limit_splits(int wanted, const ForwardParams& params, const Shape& shape) {
  return clamp(wanted, 1, clamp(ceil_div(params.seqs.sk, shape.block_n), 1, INT32_MAX));
}

bool shares_rows(int64_t rows, int num_splits, const Device& device) {
  constexpr int kWarps = 64;  // that a multiprocessor has at once
  return num_splits > common::kPartsAtOnce &&
         rows * common::kCombineWarps <= int64_t{kWarps} * device.num_sms;
}

int choose_section(const ForwardParams& params, const Shape& shape, const Device& device) {
  const int group = params.hq / params.hk / params.heads_of_tile;  // tiles with the same keys
  const int64_t bytes = int64_t{shape.element_bytes} * params.seqs.sk * (params.d + params.dv);
  const int64_t heads = int64_t{params.hk} * params.seqs.b;
  // Heads whose K and V take such a part of L2.
  const auto fitting = [&](int part) { return bytes == 0 ? 1 : device.l2_bytes / part / bytes; };
  if (shape.box_m > 0) {
    if (!has_long_tiles(params)) return group;
    // Tiles for two rounds of the device: more read K and V from memory all at once, and none
    // after.
    const int64_t blocks = num_row_blocks(params, shape);
    const int64_t few = blocks == 0 ? 1 : ceil_div(2 * int64_t{device.num_sms}, blocks * group);
    const int64_t third = fitting(3);
    return section(heads, third < few ? third : few) * group;
  }
  // Tiles of the same head run side by side, and share K and V anyway, where heads are few.
  const int64_t few = device.num_sms / 3 / group;
  // Half of L2: the rest is for other traffic.
  const int64_t half = fitting(2);
  return section(heads, half > few ? half : few) * group;
}

uint32_t last_section(const ForwardParams& params, const Shape& shape, const Device& device) {
  if (!has_long_tiles(params)) return UINT32_MAX;
  const int64_t heads = int64_t{params.hq / params.heads_of_tile} * params.seqs.b;
  const int64_t blocks = num_row_blocks(params, shape);
  // A CTA's share is as long as the longest tile, or twice as long where that costs no L2: heads of
  // so many rows fill the device, so few are read at once.
  const int64_t tiles = (2 * blocks > device.num_sms ? 4 : 2) * int64_t{device.num_sms};
  const int64_t few = blocks == 0 ? heads : ceil_div(tiles, blocks);
  return heads <= few ? 0 : static_cast<uint32_t>((heads - few) / params.heads_per_section);
}

bool wants_line(const ForwardParams& params, const Shape& shape, const Device& device) {
  const Sequences& seqs = params.seqs;
  if (!has_lengths(seqs) || seqs.b == 1) return false;
  // A packed call fills rows in any case; for others that is a launch of 2 us, or four blocks.
  constexpr int kFewBlocks = 64;  // of a CTA
  return seqs.cu_seqlens_q != nullptr || seqs.seqused_q != nullptr ||
         num_tiles(params, shape) * ceil_div(seqs.sk, shape.block_n) >=
             int64_t{kFewBlocks} * device.num_sms;
}

int blocks_in_line(const ForwardParams& params, const Shape& shape) {
  const Sequences& seqs = params.seqs;
  if (seqs.cu_seqlens_q == nullptr) return seqs.b * num_row_blocks(params, shape);
  return seqs.b + seqs.total_q / queries_of_tile(params, shape);
}

int choose_section(const BackwardParams& params, const Shape& shape, const Device& device) {
  // All columns of a head run side by side, so that its queries are read from L2.
  const int64_t heads = int64_t{params.hk} * params.seqs.b;
  if (heads == 0 || params.seqs.sk == 0) return 1;
  const int64_t most = clamp(device.num_sms * heads / num_key_blocks(params, shape), 1, heads);
  int64_t best = most;
  for (int64_t size = most; 2 * size > most; --size) {
    const auto idle = [&](int64_t x) { return ceil_div(heads, x) * x - heads; };
    if (idle(size) < idle(best)) best = size;
  }
  return static_cast<int>(best);
}

int choose_zeroed(const BackwardParams& params, const Shape& shape) {
  if (!shape.takes_blocks || !shape.makes_sums) return params.hk * params.seqs.b;
  // Long calls lose more by waiting for one another than zeros cost. Measured on an H100
  // (docs/kernels/sm90_backward.md).
  constexpr int kLeastBlocks = 8, kLeastQueries = 1024;
  const int64_t queries = seen(params.scores, params.seqs.sq) * (params.hq / params.hk);
  const bool is_short =
      queries < kLeastQueries || params.seqs.sk <= (kLeastBlocks - 1) * shape.block_n;
  const bool stores = is_short || has_lengths(params.seqs) || params.deterministic;
  return stores ? 0 : params.heads_per_section;
}

int choose_columns(const BackwardParams& params, const Shape& shape, const Device& device) {
  const int64_t blocks = ceil_div(params.seqs.sk, shape.block_n);
  const int64_t heads = int64_t{params.hk} * params.seqs.b;
  return clamp(ceil_div(device.num_sms, heads), 1, blocks < 1 ? 1 : blocks);
}

}  // namespace flash::host
