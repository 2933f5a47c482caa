// The work of warps that store what the consumers have computed.
#pragma once

#include "sm90/parts.cuh"
#include "sm90/pipeline.cuh"
#include "tile/store.cuh"

namespace flash::sm90 {

// Whether a consumer's rows of O leave in one piece, by TMA: rows behind a packed sequence belong
// to another one, those behind `seqused_q` have their values, and parts are not rounded.
template <class Cfg>
__device__ inline bool is_stored_whole(const ForwardParams& params,
                                       const TileOf<Cfg::kServesAll>& tile, int consumer) {
  if (is_split<Cfg>(params)) return false;
  const bool has_others = params.seqs.cu_seqlens_q || params.seqs.seqused_q;
  return !has_others || first_query(tile, consumer + 1) <= tile.sq;
}

// A warp's work: 16 rows of a consumer's O, its columns from `col` on, from shared memory: those
// that are the sequence's own.
template <class SmemTile>
__device__ inline void store_rows(const ForwardParams& params, const Tile& tile, uint32_t smem,
                                  int consumer, int warp_row, int col, int lane) {
  const int row = tile.row0 + 64 * consumer + warp_row;
  uint16_t* to = static_cast<uint16_t*>(params.o.ptr) + tile.batch_q * params.o.batch +
                 tile.head * params.o.head + (int64_t{tile.first_q} + row) * params.o.row + col;
  __syncwarp();
  tile::copy_out_rows<SmemTile, 16>(to, params.o.row, smem, warp_row, tile.sq - row,
                                    params.dv - col, lane);
}

// One lane's work: a consumer's rows of O.
template <class Cfg>
__device__ inline void store_output(const TmaForwardParams& params,
                                    const TileOf<Cfg::kServesAll>& tile, uint32_t smem,
                                    int consumer) {
  using TileO = typename Cfg::TileO;
#pragma unroll
  for (int panel = 0; panel < TileO::kCols / 64; ++panel) {
    if (panel * 64 < params.call.dv) {
      ptx::tma_store(params.o, smem + panel * TileO::kPanelBytes, panel * 64,
                     tile.first_q + first_query(tile, consumer), tile.head, tile.batch_q);
    }
  }
  ptx::tma_store_commit();
  ptx::tma_store_wait_read();
}

// A warp's work: log-sum-exps of a consumer's rows.
template <class Cfg>
__device__ inline void store_lse(const ForwardParams& params, const TileOf<Cfg::kServesAll>& tile,
                                 uint32_t smem, int consumer, int lane) {
  const LseRows to = lse_of(params, tile);
  const int first = first_query(tile, consumer);
#pragma unroll
  for (int row = lane; row < 64; row += 32) {
    const int head = head_of(tile, row);
    const int query = query_of(tile, first, row);
    if (query < tile.sq && head < heads_of_tile<Cfg>(params)) {
      to.ptr[head * to.head + query] = ptx::ld_shared_f32(smem + 4 * row);
    }
  }
}

// A warp's work: results of a tile, of every kStep-th consumer from `first` on, and room for the
// next.
template <int kStep, class Cfg>
__device__ inline void store_tile(const TmaForwardParams& params, const Pipeline<Cfg>& pipe,
                                  uint32_t i, int first, int lane) {
  const auto& tile = pipe.tile(i);
#pragma unroll 1
  for (int consumer = first; consumer < Cfg::kConsumers; consumer += kStep) {
    pipe.o(consumer).wait_full(i);
    store_lse<Cfg>(params.call, tile, pipe.lse_buffer(consumer), consumer, lane);
    __syncwarp();
    if (lane != 0) continue;
    if constexpr (Cfg::kHasOBuffer) {
      if (is_stored_whole<Cfg>(params.call, tile, consumer)) {
        store_output<Cfg>(params, tile, pipe.o_buffer(consumer), consumer);
      }
    }
    pipe.o(consumer).arrive_empty(i);
    pipe.tiles().arrive_empty(i);
  }
}

// A warp's work: results of every second consumer.
template <class Cfg>
__device__ inline void store_tiles(const TmaForwardParams& params, const Pipeline<Cfg>& pipe,
                                   int first, int lane) {
  if (lane == 0) ptx::tma_prefetch(params.o);
  for (uint32_t i = 0;; ++i) {
    pipe.tiles().wait_full(i);
    if (pipe.tile(i).end == 0) break;
    store_tile<2>(params, pipe, i, first, lane);
  }
  if (lane == 0) ptx::tma_store_wait();
}

}  // namespace flash::sm90
