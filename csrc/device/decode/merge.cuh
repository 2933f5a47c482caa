// What warps and CTAs with parts of the same keys make of them: O, or a part of it for others.
#pragma once

#include "attn/counter.cuh"
#include "attn/softmax.cuh"
#include "decode/work.cuh"

namespace flash::decode {

// A row: query `position` of its sequence, of query head `head`.
struct Row {
  int position, head;

  __device__ Row(const ForwardParams& call, int head_k, int index) {
    const uint32_t group = call.hq / call.hk;
    position = static_cast<uint32_t>(index) / group;
    head = head_k * group + index - position * group;
  }
};

__device__ inline int num_rows(const ForwardParams& call, const attn::Sequence& seq) {
  return call.hq / call.hk * seq.sq;
}

// Four columns of a row that is complete.
template <class T>
__device__ inline void store(const ForwardParams& call, const attn::Sequence& seq, const Row& row,
                             int col, float4 x) {
  uint16_t* to = attn::rows_of_q(call.o, call.seqs, seq, row.head) + row.position * call.o.row;
  *reinterpret_cast<uint2*>(to + col) = make_uint2(ptx::pack<T>(x.x, x.y), ptx::pack<T>(x.z, x.w));
}

__device__ inline void store_lse(const ForwardParams& call, const attn::Sequence& seq,
                                 const Row& row, float shift, float sum) {
  const int64_t batch = call.seqs.cu_seqlens_q ? 0 : seq.index * call.lse_batch;
  call.lse[batch + row.head * call.lse_head + seq.first_q + row.position] =
      sum == 0.0f ? attn::infinity() : (shift + ptx::lg2(sum)) * attn::kLn2;
}

// Where parts of a pair stand: a share has room for one of a pair that begins in it, and one of a
// pair that does not.
struct PartRows {
  float* o;
  float2* statistics;

  __device__ PartRows(const ForwardParams& call, const Parts& parts, int part) {
    const int64_t share = parts.first + part;
    const int64_t slot = call.num_splits > 0 ? share : 2 * share + (part == 0 ? 1 : 0);
    const int64_t row = slot * (call.hq / call.hk) * call.seqs.sq;
    o = call.o_partial + row * call.dv;
    statistics = reinterpret_cast<float2*>(call.lse_partial) + row;
  }
};

// Sums of parts whose shifts differ.
struct Sum {
  float shift = attn::kLowestShift;
  float sum = 0.0f;
  float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  __device__ void add(float2 statistics, float4 x) {
    const float to = fmaxf(shift, statistics.x);
    const float kept = ptx::ex2(shift - to);
    const float weight = ptx::ex2(statistics.x - to);
    shift = to;
    sum = sum * kept + statistics.y * weight;
    o.x = o.x * kept + x.x * weight;
    o.y = o.y * kept + x.y * weight;
    o.z = o.z * kept + x.z * weight;
    o.w = o.w * kept + x.w * weight;
  }

  __device__ float4 normalised() const {
    const float factor = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    return make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
  }
};

// Merges all parts of a pair.
template <class Cfg>
__device__ inline void merge_parts(const ForwardParams& call, const attn::Sequence& seq, int head_k,
                                   const Parts& parts, int thread) {
  constexpr int kAtOnce = 8;
  const int quads = call.dv / 4;
  const int rows = num_rows(call, seq);
  for (int at = thread; at < rows * quads; at += Cfg::kThreads) {
    const int r = at / quads;
    const int col = at % quads * 4;
    Sum total;
    for (int first = 0; first < parts.count; first += kAtOnce) {
      float2 statistics[kAtOnce];
      float4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const PartRows from(call, parts, min(first + i, parts.count - 1));
        statistics[i] = from.statistics[r];
        x[i] = *reinterpret_cast<const float4*>(from.o + static_cast<int64_t>(r) * call.dv + col);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < parts.count) total.add(statistics[i], x[i]);
      }
    }
    const Row row(call, head_k, r);
    store<typename Cfg::T>(call, seq, row, col, total.normalised());
    if (col == 0) store_lse(call, seq, row, total.shift, total.sum);
  }
}

// Statistics of the rows of all warps, in shared memory.
template <class Cfg>
struct Statistics {
  float2* of;  // [kWarps][16]

  // A row's largest shift, and its sum, over the warps with other keys.
  __device__ float2 merged(int row) const {
    const int warp = row / 16;
    float2 all = of[warp * 16 + row % 16];
#pragma unroll
    for (int group = 1; group < Cfg::kKeyGroups; ++group) {
      const float2 x = of[(group * Cfg::kRowWarps + warp) * 16 + row % 16];
      const float to = fmaxf(all.x, x.x);
      all.y = all.y * ptx::ex2(all.x - to) + x.y * ptx::ex2(x.x - to);
      all.x = to;
    }
    return all;
  }
};

// O of all warps, a panel of columns at a time, in shared memory: [kWarps * 16][kCols] floats.
template <class Cfg>
struct Panel {
  static constexpr int kCols = Cfg::TileQ::kPanel;
  float* at;

  // Groups of eight columns change places, so that four rows meet no bank conflict.
  __device__ float* entry(int row, int col) const {
    return at + row * kCols + (col ^ (row & 3) * 8);
  }

  __device__ void put(const typename Cfg::AccO& o, const float (&factor)[2], int panel, int warp,
                      int lane) const {
#pragma unroll
    for (int p = 0; p < Cfg::kHeadDim / kCols; ++p) {
      if (p != panel) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
          const float(&x)[4] = o.c[0][p * (kCols / 8) + n];
          *reinterpret_cast<float2*>(entry(warp * 16 + 8 * h + lane / 4, 8 * n + lane % 4 * 2)) =
              make_float2(x[2 * h] * factor[h], x[2 * h + 1] * factor[h]);
        }
      }
    }
  }

  // Four columns of a row, over the warps with other keys.
  __device__ float4 sum(int row, int col) const {
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int group = 0; group < Cfg::kKeyGroups; ++group) {
      const float4 x = *reinterpret_cast<const float4*>(entry(group * Cfg::kRows + row, col));
      all.x += x.x;
      all.y += x.y;
      all.z += x.z;
      all.w += x.w;
    }
    return all;
  }
};

// What the CTA has of a pair leaves: as results if that is all of it, else as a part, and the last
// part that comes makes results of all. Everyone is done with scratch.
template <class Cfg>
__device__ inline void finish(const DecodeParams& params, const Walk<Cfg::kBlockN>& walk,
                              const typename Cfg::AccO& o, typename Cfg::Softmax& softmax,
                              void* scratch, float2* statistics, int* flag, int thread) {
  const ForwardParams& call = params.call;
  const Statistics<Cfg> stats{statistics};
  const Panel<Cfg> buffer{static_cast<float*>(scratch)};
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int rows = num_rows(call, walk.seq);
  const bool is_whole = walk.is_whole();
  const Parts parts = is_whole ? Parts{0, 1, 0} : walk.parts();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    softmax.sum[0][h] += __shfl_xor_sync(kAllLanes, softmax.sum[0][h], 1);
    softmax.sum[0][h] += __shfl_xor_sync(kAllLanes, softmax.sum[0][h], 2);
    if (lane % 4 == 0) {
      stats.of[warp * 16 + 8 * h + lane / 4] = make_float2(softmax.shift[0][h], softmax.sum[0][h]);
    }
  }
  __syncthreads();
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 all = stats.merged(warp % Cfg::kRowWarps * 16 + 8 * h + lane / 4);
    factor[h] = ptx::ex2(softmax.shift[0][h] - all.x);
    if (is_whole) factor[h] = all.y == 0.0f ? 0.0f : __fdividef(factor[h], all.y);
  }
  constexpr int kQuads = Panel<Cfg>::kCols / 4;
  for (int panel = 0; panel * Panel<Cfg>::kCols < call.dv; ++panel) {
    if (panel > 0) __syncthreads();
    buffer.put(o, factor, panel, warp, lane);
    __syncthreads();
    const int col = panel * Panel<Cfg>::kCols + thread % kQuads * 4;
    for (int r = thread / kQuads; r < rows; r += Cfg::kThreads / kQuads) {
      if (col >= call.dv) continue;
      const float4 x = buffer.sum(r, thread % kQuads * 4);
      const Row row(call, walk.head, r);
      if (is_whole) {
        store<typename Cfg::T>(call, walk.seq, row, col, x);
      } else {
        const PartRows to(call, parts, parts.index);
        *reinterpret_cast<float4*>(to.o + static_cast<int64_t>(r) * call.dv + col) = x;
      }
      if (col == 0) {
        const float2 all = stats.merged(r);
        if (is_whole) {
          store_lse(call, walk.seq, row, all.x, all.y);
        } else {
          PartRows(call, parts, parts.index).statistics[r] = all;
        }
      }
    }
  }
  if (is_whole) return;
  const attn::Counter counter{call.next_tile + parts.first};
  __syncthreads();
  if (thread == 0) {
    ptx::fence();
    *flag = static_cast<int>(counter.count()) + 1 == parts.count;
    ptx::fence();
  }
  __syncthreads();
  if (*flag) {
    merge_parts<Cfg>(call, walk.seq, walk.head, parts, thread);
    if (thread == 0) counter.close();
  }
}

}  // namespace flash::decode
