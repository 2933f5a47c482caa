// V of 8-bit elements by columns, and the warps that bring it there.
//
// wgmma multiplies 8-bit elements only where they lie along the depth, which for P V are keys. TMA
// brings V with head dims in a row, so two warps turn each block in shared memory: ldmatrix
// transposes pairs of head dims, bytes are regrouped, stmatrix stores. Two orders come with it,
// chosen so that nobody must shuffle:
//
// - Of 16 keys a row has 0 1 8 9, 2 3 10 11, ...: as a lane holds P (Fp8Softmax::absorb).
// - Of 16 head dims even ones stand in front of odd ones, each in the order 0 4 1 5 2 6 3 7, so
// that
//   stores meet no bank conflict; in_order_of_columns() undoes it by naming registers.
#pragma once

#include "ptx/tma.cuh"
#include "sm90/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/store.cuh"

namespace flash::sm90 {

// A warp's share of a block: strips of 16 head dims, each in steps of 32 keys. Loads run a few
// steps ahead, from strip to strip too: one after the other, their latencies would make this the
// slowest part of the kernel.
template <class Cfg>
__device__ inline void transpose_block(uint32_t from, uint32_t to, int warp) {
  using TileK = typename Cfg::TileK;
  using TileVt = typename Cfg::TileVt;
  constexpr int kSteps = Cfg::kBlockN / 32;  // of a strip
  constexpr int kStrips = Cfg::kTile.v_columns() / 16 / Pipeline<Cfg>::kTransposers;
  constexpr int kAhead = kSteps % 4 == 0 ? 4 : 3;
  // Opaque, so that what is made of it is not kept from block to block.
  const uint32_t lane = ptx::opaque(static_cast<int>(threadIdx.x)) % 32;
  const uint32_t row = lane / 8 % 2 * 8 + lane % 4 * 2 + lane / 4 % 2;
  uint32_t strip = warp * kStrips;
  uint32_t load = from + TileK::offset(lane, strip);
  uint32_t store = to + TileVt::offset(16 * strip + row, lane / 16);
  uint32_t r[kAhead][4];
  const auto fetch = [&](int step) {
    if (step > 0 && step % kSteps == 0) {
      // The next chunk, behind a row's last the first of the next panel. Found from the one in
      // front: from the lane it would take a look at %tid, which ptxas keeps no register for.
      ++strip;
      load ^= (strip ^ (strip - 1)) % 8 * 16;
      if (strip % 8 == 0) load += TileK::kPanelBytes;
    }
    ptx::ldmatrix_x4_trans(r[step % kAhead], tile::walk<TileK>(load, step % kSteps * 32, 0));
  };
  const auto turn = [&](int step) {
    constexpr uint32_t kEven = 0x6420;
    constexpr uint32_t kOdd = 0x7531;
    const uint32_t (&x)[4] = r[step % kAhead];
    const uint32_t turned[4] = {
        ptx::choose_bytes<kEven>(x[0], x[1]), ptx::choose_bytes<kOdd>(x[0], x[1]),
        ptx::choose_bytes<kEven>(x[2], x[3]), ptx::choose_bytes<kOdd>(x[2], x[3])};
    ptx::stmatrix_x4(tile::walk<TileVt>(store, 0, step % kSteps * 2), turned);
    if (step % kSteps == kSteps - 1) store += 16 * 128;
  };
#pragma unroll
  for (int step = 0; step < kAhead; ++step) fetch(step);
#pragma unroll
  for (int step = 0; step < kSteps * kStrips; ++step) {
    turn(step);
    if (step + kAhead < kSteps * kStrips) fetch(step + kAhead);
  }
}

// A warp's work: its share of every block.
template <class Cfg>
__device__ inline void transpose_values(const Pipeline<Cfg>& pipe, int warp, int lane) {
  constexpr int kBarrier = 1 + 2 * Cfg::kConsumers;  // behind those of the consumers
  constexpr int kThreads = 32 * Pipeline<Cfg>::kTransposers;
  uint32_t block = 0;
  for (uint32_t i = 0;; ++i) {
    pipe.tiles().wait_full(i);
    if (pipe.tile(i).end == 0) break;
    int left = pipe.tile(i).end - pipe.tile(i).begin;
    int tail = pipe.tile(i).tail;
    __syncwarp();
    pipe.tiles().arrive_empty_if(lane == 0, i);
    for (; left > 0; --left) {
      pipe.v_in().wait_full(block);
      if (tail < Cfg::kBlockN) {
        // Keys behind the sequence: p is zero there, but V may hold anything.
        const int thread = ptx::opaque(static_cast<int>(threadIdx.x)) % kThreads;
        tile::clear_rows<typename Cfg::TileK, kThreads>(pipe.v_in_buffer(block), tail, thread);
        ptx::fence_async_proxy();
        ptx::named_barrier_sync(kBarrier, kThreads);
        tail = Cfg::kBlockN;
      }
      pipe.v().wait_empty(block);
      transpose_block<Cfg>(pipe.v_in_buffer(block), pipe.v_buffer(block), warp);
      ptx::fence_async_proxy();
      __syncwarp();
      pipe.v_in().arrive_empty_if(lane == 0, block);
      pipe.v().arrive_full_if(lane == 0, block);
      ++block;
    }
  }
}

// O, whose columns stand as the head dims of V do, as a lane's accumulators usually stand.
template <int kN>
__device__ __forceinline__ tile::Accumulators<1, kN> in_order_of_columns(
    const tile::Accumulators<1, kN>& o) {
  tile::Accumulators<1, kN> ordered;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ordered.c[0][n][i] = o.c[0][n + i % 2][i / 2 * 2];
      ordered.c[0][n + 1][i] = o.c[0][n + i % 2][i / 2 * 2 + 1];
    }
  }
  return ordered;
}

}  // namespace flash::sm90
