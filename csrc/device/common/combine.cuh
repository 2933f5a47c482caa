// Merges the parts of a split call: o = sum of w o_part / sum of w, w = exp(lse_part - max).
//
// A warp takes 128 columns of a row: its lanes share the parts to find the maximum and the sum,
// then the columns, four each. Where rows are few, all warps of a CTA do, each some of the parts. A
// part without keys (lse -inf, or +inf as published calls return it) counts nothing, whatever its o
// holds; a row that no part saw gets o 0 and lse +inf. Bound by memory, and by its latency where
// rows are few: loads of several parts are on their way at a time.
#pragma once

#include "attn/sequence.cuh"
#include "attn/softmax.cuh"
#include "common/config.h"
#include "ptx/memory.cuh"

namespace flash::common {

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The log-sum-exp of one row in each part.
struct PartialLse {
  const float* ptr;
  int64_t stride;

  // -inf for a part without keys.
  __device__ float operator[](int split) const {
    const float lse = ptr[split * stride];
    return lse == attn::infinity() ? -lse : lse;
  }
};

// The warps' sums of four columns a lane, in the order of warps: those of all, for every warp.
__device__ inline float4 add_up(float4 (&sums)[kCombineWarps][32], float4 own, int warp, int lane) {
  sums[warp][lane] = own;
  __syncthreads();
  float4 total = sums[0][lane];
#pragma unroll
  for (int i = 1; i < kCombineWarps; ++i) {
    const float4 x = sums[i][lane];
    total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
  }
  return total;
}

// Four columns of a row.
template <class T>
__device__ inline void store_columns(const CombineParams& params, int64_t at, float4 x) {
  if (params.o_is_float) {
    *reinterpret_cast<float4*>(static_cast<float*>(params.o.ptr) + at) = x;
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(params.o.ptr) + at) =
        make_uint2(ptx::pack<T>(x.x, x.y), ptx::pack<T>(x.z, x.w));
  }
}

// Grid: groups of columns times rows times hq times b, one a CTA if its warps share it, else one a
// warp.
template <class T>
__device__ inline void combine(const CombineParams& params) {
  __shared__ float4 sums[kCombineWarps][32];
  ptx::let_kernel_behind_begin();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t cta = blockIdx.x;
  const int64_t task = params.shares_rows ? cta : cta * kCombineWarps + warp;
  const int groups = (params.dv + kCombineColumns - 1) / kCombineColumns;
  const int64_t of_all = task / groups;
  const int col = static_cast<int>(task - of_all * groups) * kCombineColumns + 4 * lane;
  const int share = params.shares_rows ? warp : 0;
  const int step = kPartsAtOnce * (params.shares_rows ? kCombineWarps : 1);
  const int row = static_cast<int>(of_all % params.seqs.sq);
  const int head = static_cast<int>(of_all / params.seqs.sq % params.hq);
  const int64_t index = of_all / params.seqs.sq / params.hq;
  if (index >= params.seqs.b) return;
  ptx::wait_for_kernel_in_front();
  const attn::Sequence seq(params.seqs, static_cast<int>(index));
  if (row >= seq.sq) return;

  const Parts& parts = params.o_partial;
  const float* o = parts.ptr + index * parts.batch + row * parts.row + head * parts.head;
  float4 x[kPartsAtOnce];
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kPartsAtOnce; ++j) {
      const bool is_there = first + j < params.num_splits && col < params.dv;
      x[j] = is_there ? *reinterpret_cast<const float4*>(o + (first + j) * parts.split + col)
                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  };
  // These are on their way beside the log-sum-exps.
  load(kPartsAtOnce * share);
  bool is_loaded = true;

  const Parts& from = params.lse_partial;
  const PartialLse lse{from.ptr + index * from.batch + row * from.row + head * from.head,
                       from.split};
  float maximum = -attn::infinity();
#pragma unroll 1
  for (int split = lane; split < params.num_splits; split += 32) {
    maximum = fmaxf(maximum, lse[split]);
  }
  maximum = warp_max(maximum);
  const bool is_empty = maximum == -attn::infinity();
  const float shift = is_empty ? 0.0f : maximum * attn::kLog2e;
  float sum = 0.0f;
#pragma unroll 1
  for (int split = lane; split < params.num_splits; split += 32) {
    sum += ptx::ex2(lse[split] * attn::kLog2e - shift);
  }
  sum = warp_sum(sum);
  const int64_t batch = params.seqs.cu_seqlens_q ? 0 : index;
  const int64_t at_row = seq.first_q + row;
  if (col == 0 && share == 0) {
    params.lse[batch * params.lse_batch + head * params.lse_head + at_row * params.lse_row] =
        is_empty ? attn::infinity() : maximum + ptx::lg2(sum) * attn::kLn2;
  }

  const int64_t to = batch * params.o.batch + at_row * params.o.row + head * params.o.head;
  const float factor = is_empty ? 0.0f : 1.0f / sum;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int first = 0; first < params.num_splits; first += 32) {
    // A lane has the weight of a part, and hands it to the others, whether it has columns or not.
    const int own = first + lane;
    const float weight =
        own < params.num_splits ? ptx::ex2(lse[own] * attn::kLog2e - shift) * factor : 0.0f;
#pragma unroll 1
    for (int i = kPartsAtOnce * share; i < 32 && first + i < params.num_splits; i += step) {
      if (!is_loaded) load(first + i);
      is_loaded = false;
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        const float w = __shfl_sync(0xffffffffu, weight, i + j);
        if (w == 0.0f) continue;  // what has no keys may hold anything
        total.x += w * x[j].x;
        total.y += w * x[j].y;
        total.z += w * x[j].z;
        total.w += w * x[j].w;
      }
    }
  }
  if (params.shares_rows) total = add_up(sums, total, warp, lane);
  if (col < params.dv && share == 0) store_columns<T>(params, to + col, total);
}

}  // namespace flash::common
