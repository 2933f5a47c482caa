// What comes to the consumers of a latent's CTA: tiles and queries from one warp, blocks of K and V
// from one or two others.
#pragma once

#include "sm90/latent_pipeline.cuh"
#include "sm90/producer.cuh"

namespace flash::sm90 {

// Pages of rows that are no boxes, or from a key on that stands anywhere in its page: keys are
// copied one by one.
__device__ inline bool is_gathered(const Sequences& seqs) {
  return seqs.block_table && (seqs.page_size % kLeastPageRows != 0 || seqs.leftpad_k);
}

// One lane's work: what the CTA does next, and its queries as soon as there is room.
template <class Cfg>
__device__ inline void plan_latent_tiles(const TmaLatentParams& params,
                                         const LatentPipeline<Cfg>& pipe) {
  using TileQ = typename Cfg::TileQ;
  ptx::tma_prefetch(params.all.q);
  const bool has_qv = params.all.call.has_qv;
  const int panels = has_qv ? Cfg::kPanels : 1;
  if (has_qv) ptx::tma_prefetch(params.qv);
  Schedule<Cfg, LatentPipeline<Cfg>> schedule(params.all, pipe);
  for (uint32_t i = 0;; ++i) {
    pipe.tiles().wait_empty(i);
    auto& tile = pipe.tile(i);
    schedule.next(tile);
    const bool is_last = tile.end == 0;
    pipe.tiles().arrive_full(i);
    if (is_last) break;
    const int used = params.all.call.heads_of_tile * tile.queries;
    pipe.q().wait_empty(i);
    ptx::mbarrier_arrive_expect(pipe.q().full(i), panels * used * 128);
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
      ptx::tma_load(pipe.q_buffer() + panel * TileQ::kPanelBytes,
                    panel == 0 ? params.all.q : params.qv, pipe.q().full(i),
                    panel == 0 ? 0 : (panel - 1) * 64, tile.first_q + tile.row0, tile.head,
                    tile.batch_q, ptx::Keep::kShort);
    }
    // No tile is taken before that: another CTA may be free sooner.
    pipe.ended().wait_full(i);
  }
}

// A block whose keys stand in boxes of rows, one behind the other: one warp's work. Each lane
// copies some panels of a piece.
template <class Cfg>
class LatentBoxes {
  using TileKV = typename Cfg::TileKV;
  using Pipe = LatentPipeline<Cfg>;
  int pieces_, first_;  // of the block; where this lane's begins in it
  PieceOfPage piece_;

 public:
  static constexpr int kWarps = 1;

  __device__ LatentBoxes(const ForwardParams& params, const Tile& tile, int j, int, int lane) {
    const Sequences& seqs = params.seqs;
    pieces_ = 1;
    if (seqs.block_table) {
      const int rows = rows_of_piece(seqs.page_size, Cfg::kBlockN);
      pieces_ = Cfg::kBlockN / rows;
      first_ = lane % pieces_ * rows;
      piece_ = PieceOfPage(seqs, tile, j * Cfg::kBlockN + first_, rows);
    } else {
      first_ = 0;
      piece_.row = tile.first_k + j * Cfg::kBlockN;
      piece_.page = tile.batch_k;
    }
  }

  // Each CTA of a pair copies every second panel, to both.
  __device__ void load(const TmaForwardParams& params, const Pipe& pipe, const Tile& tile,
                       uint32_t block, int, int lane) const {
    const int ctas = pipe.ctas();
    if (lane < Cfg::kPanels) {
      ptx::mbarrier_arrive_expect(pipe.panel(lane).full(block), TileKV::kPanelBytes);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane / pieces_; i < Cfg::kPanels; i += 32 / pieces_) {
      if (ctas > 1 && i % 2 != pipe.rank()) continue;
      const uint32_t to = pipe.k_buffer(block) + i * TileKV::kPanelBytes + first_ * 128;
      const TensorMap& map = i == 0 ? params.k : params.v;
      const int col = i == 0 ? 0 : (i - 1) * 64;
      const uint32_t full = pipe.panel(i).full(block);
      if (ctas > 1) {
        ptx::tma_load_to_both(to, map, full, col, piece_.row, tile.head_k, piece_.page, kKeepKeys);
      } else {
        ptx::tma_load(to, map, full, col, piece_.row, tile.head_k, piece_.page, kKeepKeys);
      }
    }
  }
};

// A block whose keys stand anywhere: the work of several warps. Each lane looks up a key, and tells
// the others.
template <class Cfg>
class LatentKeys {
  using TileKV = typename Cfg::TileKV;
  using Pipe = LatentPipeline<Cfg>;
  int64_t key_, value_;  // where this lane's key, and its value, begin

 public:
  static constexpr int kWarps = Pipe::kLoaders;
  static_assert(Cfg::kBlockN == 32 * kWarps, "a key for each lane");

  __device__ LatentKeys(const ForwardParams& params, const Tile& tile, int j, int warp, int lane) {
    const Sequences& seqs = params.seqs;
    // Behind the last key anything may stand, but not outside the cache.
    const int key = min(j * Cfg::kBlockN + 32 * warp + lane, max(tile.sk - 1, 0));
    const int slot = tile.first_k + key;
    const int64_t page = tile.sk > 0 ? page_of(seqs, tile, slot) : 0;
    const auto row_of = [&](const Rows& x) {
      return page * x.batch + slot % seqs.page_size * x.row + tile.head_k * x.head;
    };
    key_ = row_of(params.k);
    value_ = row_of(params.v);
  }

  __device__ void load(const TmaForwardParams& params, const Pipe& pipe, const Tile& tile,
                       uint32_t block, int warp, int lane) const {
    const ForwardParams& call = params.call;
    const bool has_keys = tile.sk > 0;
    // Another lane's row.
    const auto row_of = [](const Rows& x, int64_t own, int key) {
      return static_cast<const uint16_t*>(x.ptr) + __shfl_sync(0xffffffffu, own, key);
    };
    // Columns that are not there become zeros.
    constexpr int kChunks = Cfg::kValueDim / 8 / 32;  // of a lane
    bool has_value[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) has_value[i] = has_keys && 8 * (lane + 32 * i) < call.dv;
    const bool has_key = has_keys && 8 * (lane % 8) < call.d;
#pragma unroll 1
    for (int key = lane / 8; key < 32; key += 4) {
      ptx::cp_async_16(pipe.k_buffer(block) + TileKV::offset(32 * warp + key, lane % 8),
                       row_of(call.k, key_, key) + 8 * (lane % 8), has_key);
    }
    ptx::cp_async_arrive(pipe.panel(0).full(block));
#pragma unroll 4
    for (int key = 0; key < 32; ++key) {
      const uint16_t* row = row_of(call.v, value_, key);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int chunk = lane + 32 * i;
        ptx::cp_async_16(pipe.v_buffer(block) + TileKV::offset(32 * warp + key, chunk),
                         row + 8 * chunk, has_value[i]);
      }
    }
#pragma unroll 1
    for (int i = 1; i < Cfg::kPanels; ++i) ptx::cp_async_arrive(pipe.panel(i).full(block));
  }
};

// A loading warp's work: all blocks, in the order in which the consumers take them. Where their
// keys stand is looked up before there is room.
template <class Cfg, class Block>
__device__ inline void load_latent_blocks(const TmaForwardParams& params,
                                          const LatentPipeline<Cfg>& pipe, int warp, int lane) {
  uint32_t block = 0;
  for (uint32_t i = 0;; ++i) {
    pipe.tiles().wait_full(i);
    const Tile& tile = pipe.tile(i);
    if (tile.end == 0) break;
    for (int j = tile.end - 1; j >= tile.begin && warp < Block::kWarps; --j, ++block) {
      const Block now(params.call, tile, j, warp, lane);
      pipe.panel(0).wait_empty(block);
      now.load(params, pipe, tile, block, warp, lane);
    }
    __syncwarp();
    if (lane == 0) pipe.tiles().arrive_empty(i);
    if (lane == 0 && warp == 0) pipe.ended().arrive_full(i);
  }
}

template <class Cfg>
__device__ inline void load_latent_blocks(const TmaForwardParams& params,
                                          const LatentPipeline<Cfg>& pipe, int warp, int lane) {
  if (is_gathered(params.call.seqs)) {
    load_latent_blocks<Cfg, LatentKeys<Cfg>>(params, pipe, warp, lane);
  } else {
    load_latent_blocks<Cfg, LatentBoxes<Cfg>>(params, pipe, warp, lane);
  }
}

}  // namespace flash::sm90
