// How a consumer's O leaves: normalised, rounded, by way of shared memory.
#pragma once

#include "ptx/tma.cuh"
#include "sm90/fp8_transpose.cuh"
#include "sm90/own.cuh"
#include "sm90/softmax.cuh"
#include "sm90/storing.cuh"
#include "tile/store.cuh"
#include "tile/warpgroup.cuh"

namespace flash::sm90 {

template <class Cfg>
class Output {
  using Out = typename Cfg::Out;
  using TileO = typename Cfg::TileO;
  using AccO = typename Cfg::AccO;
  static constexpr int kHalf = TileO::kCols;  // of O's columns, where it leaves in halves

 public:
  __device__ __forceinline__ Output(const TmaForwardParams& params, const Pipeline<Cfg>& pipe,
                                    int consumer)
      : params_(params.call), map_(params.o), pipe_(pipe), consumer_(consumer) {}

  // Writes the log-sum-exp of a tile for those who store it, and keeps what normalises its O. A row
  // without keys gets O 0.
  __device__ __forceinline__ void finish_sums(const Softmax& softmax, uint32_t tile) const {
    const uint32_t row = (Own::warp_row() + Own::lane() / 4) * 4;
    pipe_.o(consumer_).wait_empty(tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = softmax.row_sum(h);
      const bool is_empty = sum == 0.0f;
      float factor = is_empty ? 0.0f : ptx::rcp(sum);
      if constexpr (Cfg::kIsFp8) factor *= pipe_.descale(tile).v;
      const float lse_of_row = (softmax.shift[h] + ptx::lg2(sum)) * attn::kLn2;
      // The same from all four lanes of a row.
      ptx::st_shared_32(pipe_.factor_buffer(consumer_) + row + 32 * h, __float_as_uint(factor));
      ptx::st_shared_32(pipe_.lse_buffer(consumer_) + row + 32 * h,
                        __float_as_uint(is_empty ? attn::infinity() : lse_of_row));
    }
  }

  // Normalises and stores O, or half of it.
  __device__ __forceinline__ void store(const AccO& o, uint32_t tile) {
    if constexpr (Cfg::kIsFp8) {
      store_ordered(in_order_of_columns(o), tile);
    } else {
      store_ordered(o, tile);
    }
  }

  // The second half of O's columns, for which there was no room beside the first.
  __device__ __forceinline__ void store_rest(uint32_t tile) {
    const auto& t = pipe_.tile(tile);
    if (!Cfg::kServesAll || is_whole(t)) store_half(t, rest_, kHalf);
    pipe_.o(consumer_).arrive_full(tile);
  }

 private:
  __device__ bool is_whole(const TileOf<Cfg::kServesAll>& t) const {
    return is_stored_whole<Cfg>(params_, t, consumer_);
  }
  // Of what is in shared memory: kernels for all calls store row by row from registers.
  __device__ bool leaves_whole(const TileOf<Cfg::kServesAll>& t) const {
    return Cfg::kServesAll || is_whole(t);
  }

  __device__ __forceinline__ void store_ordered(const AccO& o, uint32_t tile) {
    const auto& t = pipe_.tile(tile);
    const uint32_t factors =
        pipe_.factor_buffer(consumer_) + (Own::warp_row() + Own::lane() / 4) * 4;
    __syncwarp();
    const float factor[2] = {ptx::ld_shared_f32(factors), ptx::ld_shared_f32(factors + 32)};
    if constexpr (Cfg::kServesAll) {
      if (!is_whole(t)) {
        store_row_by_row(t, o, factor);
        if constexpr (Cfg::kHasOBuffer) {
          pipe_.o(consumer_).arrive_full(tile);
        } else {
          // Else the last tile's second half would be kept in its registers.
          for (auto& fragment : rest_) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
        }
        return;
      }
    }
    if constexpr (Cfg::kHasOBuffer) {
      const uint32_t smem = pipe_.o_buffer(consumer_);
      tile::store_matrix<Out, TileO>(smem, o, factor, Own::warp_row(), Own::lane());
      if (!leaves_whole(t)) {
        store_rows<TileO>(params_, t, smem, consumer_, Own::warp_row(), 0, Own::lane());
      }
      ptx::fence_async_proxy();
      pipe_.o(consumer_).arrive_full(tile);
    } else {
      uint32_t half[kHalf / 16][4];
      tile::pack<Out>(rest_, o, factor, kHalf / 8);
      tile::pack<Out>(half, o, factor, 0);
      store_half(t, half, 0);
    }
  }

  // What does not leave in one piece, from registers: parts, unrounded, and rows behind which
  // another sequence's stand.
  __device__ __forceinline__ void store_row_by_row(const TileOf<true>& t, const AccO& o,
                                                   const float (&factor)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = Own::warp_row() + Own::lane() / 4 + 8 * h;
      const int query = query_of(t, first_query(t, consumer_), row);
      const int head = head_of(t, row);
      if (query >= t.sq || head >= params_.heads_of_tile) continue;
      if (params_.num_splits > 1) {
        const int64_t at = row_of_part(params_, t, head) + query;
        tile::store_row(params_.o_partial + at * params_.dv, o.c[0], h, factor[h], params_.dv,
                        Own::lane());
      } else {
        const Rows& to = params_.o;
        const int64_t at = t.batch_q * to.batch + (t.head + head) * to.head +
                           (int64_t{t.first_q} + query) * to.row;
        tile::store_row<Out>(static_cast<uint16_t*>(to.ptr) + at, o.c[0], h, factor[h], params_.dv,
                             Own::lane());
      }
    }
  }

  // Half of O, from column `col` on: it leaves while the consumer goes on.
  __device__ __forceinline__ void store_half(const TileOf<Cfg::kServesAll>& t,
                                             const uint32_t (&half)[kHalf / 16][4], int col) const {
    const uint32_t smem = pipe_.o_buffer(consumer_);
    const bool is_whole = leaves_whole(t);
    ptx::tma_store_wait_read<0>();
    ptx::named_barrier_sync(1 + consumer_, 128);
    tile::store_a<TileO>(smem, half, Own::warp_row(), Own::lane());
    if (!is_whole) {
      store_rows<TileO>(params_, t, smem, consumer_, Own::warp_row(), col, Own::lane());
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(1 + consumer_, 128);
#pragma unroll
    for (int panel = 0; panel < kHalf / 64; ++panel) {
      const int at = col + 64 * panel;
      ptx::tma_store_if(is_whole && Own::thread() == 0 && at < params_.dv, map_,
                        smem + panel * TileO::kPanelBytes, at,
                        t.first_q + first_query(t, consumer_), t.head, t.batch_q);
    }
    ptx::tma_store_commit();
  }

  const ForwardParams& params_;
  const TensorMap& map_;
  const Pipeline<Cfg>& pipe_;
  const int consumer_;
  uint32_t rest_[kHalf / 16][4];  // the second half
};

}  // namespace flash::sm90
