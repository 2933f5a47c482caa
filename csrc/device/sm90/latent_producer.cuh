// What comes to the consumers of a latent's CTA: tiles and queries from one warp, blocks of K and V
// from another.
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
  ptx::tma_prefetch(params.qv);
  const bool has_qv = params.all.call.has_qv;
  const int panels = has_qv ? Cfg::kPanels : 1;
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
  }
}

// One warp's work: a block in boxes of one panel, of as many rows as stand one behind the other.
template <class Cfg>
__device__ inline void copy_block(const TmaForwardParams& params, const LatentPipeline<Cfg>& pipe,
                                  const Tile& tile, int j, uint32_t block, int lane) {
  using TileKV = typename Cfg::TileKV;
  const Sequences& seqs = params.call.seqs;
  int rows = Cfg::kBlockN;
  int row = tile.first_k + j * Cfg::kBlockN;
  int batch = tile.batch_k;
  if (seqs.block_table) rows = rows_of_piece(seqs.page_size, Cfg::kBlockN);
  const int pieces = Cfg::kBlockN / rows;
  const int first = lane % pieces * rows;
  if (seqs.block_table) {
    const PieceOfPage piece(seqs, tile, j * Cfg::kBlockN + first, rows);
    row = piece.row;
    batch = piece.page;
  }
  if (lane < Cfg::kPanels) {
    ptx::mbarrier_arrive_expect(pipe.panel(lane).full(block), TileKV::kPanelBytes);
  }
  __syncwarp();
#pragma unroll 1
  for (int panel = lane / pieces; panel < Cfg::kPanels; panel += 32 / pieces) {
    ptx::tma_load(pipe.k_buffer(block) + panel * TileKV::kPanelBytes + first * 128,
                  panel == 0 ? params.k : params.v, pipe.panel(panel).full(block),
                  panel == 0 ? 0 : (panel - 1) * 64, row, tile.head_k, batch, kKeepKeys);
  }
}

// Every loading warp's work: its keys of a block, wherever they stand. Each lane looks up one, and
// tells the others.
template <class Cfg>
__device__ inline void gather_block(const ForwardParams& params, const LatentPipeline<Cfg>& pipe,
                                    const Tile& tile, int j, uint32_t block, int warp, int lane) {
  using TileKV = typename Cfg::TileKV;
  static_assert(Cfg::kBlockN == 32 * LatentPipeline<Cfg>::kLoaders, "a key for each lane");
  const Sequences& seqs = params.seqs;
  const bool has_keys = tile.sk > 0;
  // Behind the last key anything may stand, but not outside the cache.
  const int slot = tile.first_k + min(j * Cfg::kBlockN + 32 * warp + lane, max(tile.sk - 1, 0));
  const int64_t page = has_keys ? page_of(seqs, tile, slot) : 0;
  const auto row_of = [&](const Rows& x) {
    return page * x.batch + slot % seqs.page_size * x.row + tile.head_k * x.head;
  };
  const int64_t own_k = row_of(params.k);
  const int64_t own_v = row_of(params.v);
  // 16 bytes of the key that another lane has found; columns that are not there become zeros.
  const auto copy = [&](const Rows& x, int64_t own, int key, int chunk, int columns, uint32_t to) {
    const int64_t row = __shfl_sync(0xffffffffu, own, key);
    ptx::cp_async_16(to + TileKV::offset(32 * warp + key, chunk),
                     static_cast<const uint16_t*>(x.ptr) + row + 8 * chunk,
                     has_keys && 8 * chunk < columns);
  };
#pragma unroll 1
  for (int key = lane / 8; key < 32; key += 4) {
    copy(params.k, own_k, key, lane % 8, params.d, pipe.k_buffer(block));
  }
  ptx::cp_async_arrive(pipe.panel(0).full(block));
  constexpr int kPanelsAtOnce = 4;  // 32 chunks
#pragma unroll 1
  for (int panel = 0; panel < Cfg::kPanels - 1; panel += kPanelsAtOnce) {
#pragma unroll 4
    for (int key = 0; key < 32; ++key) {
      copy(params.v, own_v, key, panel * 8 + lane, params.dv, pipe.v_buffer(block));
    }
#pragma unroll
    for (int i = 1; i <= kPanelsAtOnce; ++i) {
      ptx::cp_async_arrive(pipe.panel(panel + i).full(block));
    }
  }
}

// Every loading warp's work: all blocks, in the order in which the consumers take them.
template <class Cfg>
__device__ inline void load_latent_blocks(const TmaForwardParams& params,
                                          const LatentPipeline<Cfg>& pipe, int warp, int lane) {
  const bool gathers = is_gathered(params.call.seqs);
  uint32_t block = 0;
  for (uint32_t i = 0;; ++i) {
    pipe.tiles().wait_full(i);
    const Tile& tile = pipe.tile(i);
    if (tile.end == 0) break;
    for (int j = tile.end - 1; j >= tile.begin; --j, ++block) {
      if (!gathers && warp > 0) continue;
      pipe.panel(0).wait_empty(block);
      if (gathers) {
        gather_block(params.call, pipe, tile, j, block, warp, lane);
      } else {
        copy_block(params, pipe, tile, j, block, lane);
      }
    }
    __syncwarp();
    if (lane == 0) pipe.tiles().arrive_empty(i);
  }
}

}  // namespace flash::sm90
