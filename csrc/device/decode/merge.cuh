// What warps and CTAs with parts of the same keys make of them: O, or a part of it for others.
#pragma once

#include "attn/counter.cuh"
#include "attn/softmax.cuh"
#include "decode/work.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/fp8_products.cuh"

namespace flash::decode {

// A row: query `position` of its sequence, of query head `head`.
struct Row {
  int position, head;

  __device__ Row(const DecodeParams& params, int head_k, uint32_t index) {
    const uint32_t group = params.group;
    position = index * params.group_inverse >> 16;
    head = head_k * group + index - position * group;
  }
};

__device__ inline int num_rows(const DecodeParams& params, const attn::Sequence& seq) {
  return params.group * seq.sq;
}

// Two results, of a kernel whose keys are of T. Over keys of 8 bits the caller says what they are.
template <class T>
__device__ inline uint32_t pack_results(const ForwardParams& call, float x, float y) {
  if constexpr (!tile::kIsFp8<T>) {
    return ptx::pack<T>(x, y);
  } else {
    return call.q_dtype == FLASH_FP16 ? ptx::pack<ptx::Half>(x, y) : ptx::pack<ptx::Bfloat16>(x, y);
  }
}

// Four columns of a row that is complete.
template <class T>
__device__ inline void store(const ForwardParams& call, const attn::Sequence& seq, const Row& row,
                             int col, float4 x) {
  uint16_t* to = attn::rows_of_q(call.o, call.seqs, seq, row.head) + row.position * call.o.row;
  *reinterpret_cast<uint2*>(to + col) =
      make_uint2(pack_results<T>(call, x.x, x.y), pack_results<T>(call, x.z, x.w));
}

__device__ inline void store_lse(const ForwardParams& call, const attn::Sequence& seq,
                                 const Row& row, float shift, float sum) {
  const int64_t batch = call.seqs.cu_seqlens_q ? 0 : seq.index * call.lse_batch;
  call.lse[batch + row.head * call.lse_head + seq.first_q + row.position] =
      sum == 0.0f ? attn::infinity() : (shift + ptx::lg2(sum)) * attn::kLn2;
}

// Where the parts of a pair stand. Where pairs are cut anywhere, a share has two rooms: one for a
// pair that began in front of it, then one for a pair that goes on behind it.
struct PartRows {
  float* o;
  float2* statistics;
  uint32_t rooms;  // of a share
  uint32_t stride;
  uint32_t rows;  // of a room
  uint32_t width;

  __device__ PartRows(const DecodeParams& params, const Parts& parts)
      : rooms(params.call.num_splits > 0 ? 1 : 2),
        stride(parts.stride),
        rows(params.group * params.call.seqs.sq),
        width(params.call.dv) {
    const int64_t first = static_cast<int64_t>(parts.first * rooms) * rows;
    o = params.call.o_partial + first * width;
    statistics = reinterpret_cast<float2*>(params.call.lse_partial) + first;
  }

  // Of a part: four columns of a row, and the row's statistics.
  __device__ float4& quad(uint32_t part, uint32_t row, int col) const {
    float* from = o + static_cast<int64_t>(room(part)) * (rows * width) + row * width;
    return *reinterpret_cast<float4*>(from + col);
  }
  __device__ float2& statistics_of(uint32_t part, uint32_t row, int) const {
    return statistics[room(part) * rows + row];
  }

 private:
  __device__ uint32_t room(uint32_t part) const { return max(part * stride * rooms, rooms - 1); }
};

// A sum of parts whose shifts differ.
struct Sum {
  float shift = attn::kLowestShift;
  float sum = 0.0f;
  float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  // Several parts at once: their exponentials do not wait for one another.
  template <int kParts>
  __device__ void add(const float2 (&statistics)[kParts], const float4 (&x)[kParts]) {
    float to = shift;
#pragma unroll
    for (int i = 0; i < kParts; ++i) to = fmaxf(to, statistics[i].x);
    const float kept = ptx::ex2(shift - to);
    shift = to;
    sum *= kept;
    o = make_float4(o.x * kept, o.y * kept, o.z * kept, o.w * kept);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float weight = ptx::ex2(statistics[i].x - to);
      sum += statistics[i].y * weight;
      o.x += x[i].x * weight;
      o.y += x[i].y * weight;
      o.z += x[i].z * weight;
      o.w += x[i].w * weight;
    }
  }

  __device__ float4 normalised() const {
    const float factor = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    return make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
  }
};

// Quads of all rows of a pair, row behind row: four columns of a row.
struct Quads {
  int begin, end;
};

// The CTAs of a cluster cut the rows into as many pieces, and each gets its piece of everyone.
template <class Cfg>
struct Exchange {
  static constexpr int kQuads = Cfg::kHeadDim / 4;  // of a row
  const unsigned char* room;                        // where the ring was
  uint32_t barrier;                                 // counts what comes
  int rank = 0, count = 1;                          // this CTA, of those with keys
  int each = 0;                                     // quads of a piece

  __device__ Exchange(const unsigned char* room, const void* barrier)
      : room(room), barrier(ptx::smem_address(barrier)) {}

  // By one thread, in front of everything.
  __device__ void prepare() const {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
  }

  // Everyone in this CTA is done with the ring. Returns the CTA's piece.
  __device__ Quads open(const Parts& parts, int cluster, int rows, int thread) {
    const int all = rows * kQuads;
    rank = parts.index & (cluster - 1);
    count = min(parts.count, cluster);
    each = static_cast<uint32_t>(all + count - 1) / static_cast<uint32_t>(count);
    const Quads mine = {min(rank * each, all), min((rank + 1) * each, all)};
    if (thread == 0) ptx::mbarrier_arrive_expect(barrier, (mine.end - mine.begin) * count * kBytes);
    ptx::cluster_arrive();
    return mine;
  }

  // To whom it belongs, who has opened.
  __device__ void put(int row, int col, const Sum& total) const {
    const int at = row * kQuads + col / 4;
    const int to = static_cast<uint32_t>(at) / static_cast<uint32_t>(each);
    const int slot = rank * each + at - to * each;
    const uint32_t there = ptx::of_cta(barrier, to);
    ptx::send(ptx::of_cta(ptx::smem_address(quads() + slot), to), total.o, there);
    ptx::send(ptx::of_cta(ptx::smem_address(statistics() + slot), to),
              make_float2(total.shift, total.sum), there);
  }

  __device__ float4 quad(int part, int row, int col) const { return quads()[slot(part, row, col)]; }
  __device__ float2 statistics_of(int part, int row, int col) const {
    return statistics()[slot(part, row, col)];
  }

 private:
  static constexpr int kBytes = sizeof(float4) + sizeof(float2);

  __device__ const float4* quads() const { return reinterpret_cast<const float4*>(room); }
  __device__ const float2* statistics() const {
    return reinterpret_cast<const float2*>(quads() + Cfg::kTile.quads());
  }
  __device__ int slot(int part, int row, int col) const {
    return part * each + row * kQuads + col / 4 - rank * each;
  }
};

// Merges parts: `put` takes the sum of four columns of a row.
template <class Cfg, class From, class Put>
__device__ inline void merge_parts(const From& from, int count, const Quads& quads, int dv,
                                   int thread, const Put& put) {
  constexpr int kQuads = Cfg::kHeadDim / 4;
  for (int at = quads.begin + thread; at < quads.end; at += Cfg::kThreads) {
    const int row = at / kQuads;
    const int col = at % kQuads * 4;
    if (col >= dv) continue;
    Sum total;
#pragma unroll 1
    for (int first = 0; first < count; first += kPartsAtOnce) {
      float2 statistics[kPartsAtOnce];
      float4 x[kPartsAtOnce];
#pragma unroll
      for (int i = 0; i < kPartsAtOnce; ++i) {
        // Behind the last one it counts as a part without keys.
        const int part = min(first + i, count - 1);
        statistics[i] = make_float2(attn::kLowestShift, 0.0f);
        if (first + i < count) statistics[i] = from.statistics_of(part, row, col);
        x[i] = from.quad(part, row, col);
      }
      total.add(statistics, x);
    }
    put(row, col, total);
  }
}

// What warps have of a pair, in shared memory: their rows' statistics, and eight rows of O at a
// time.
template <class Cfg>
struct WarpRows {
  float2* statistics;  // [kWarps][16]
  float* o;            // [kWarps][8][kHeadDim]

  // Groups of eight columns change places, so that four rows meet no bank conflict.
  __device__ float* entry(int warp, int row, int col) const {
    return o + (warp * 8 + row) * Cfg::kHeadDim + (col ^ (row & 3) * 8);
  }

  // Rows [8 half, + 8) of this warp's 16.
  template <int half>
  __device__ void put(const typename Cfg::AccO& acc, const typename Cfg::Softmax& softmax, int warp,
                      int lane) const {
    const int row = lane / 4;
#pragma unroll
    for (int n = 0; n < Cfg::kHeadDim / 8; n += 2) {
      const float* a = acc.c[0][n] + 2 * half;
      const float* b = acc.c[0][n + 1] + 2 * half;
      if constexpr (Cfg::kIsFp8) {
        // Even columns, and odd ones.
        *reinterpret_cast<float4*>(entry(warp, row, 8 * n + lane % 4 * 4)) =
            make_float4(a[0], b[0], a[1], b[1]);
      } else {
        *reinterpret_cast<float2*>(entry(warp, row, 8 * n + lane % 4 * 2)) =
            make_float2(a[0], a[1]);
        *reinterpret_cast<float2*>(entry(warp, row, 8 * n + 8 + lane % 4 * 2)) =
            make_float2(b[0], b[1]);
      }
    }
    if (lane % 4 == 0) {
      statistics[warp * 16 + 8 * half + row] =
          make_float2(softmax.shift[0][half], softmax.sum[0][half]);
    }
  }

  // Four columns of a row of the tile, over the warps with other keys.
  __device__ Sum sum(int row, int col) const {
    float2 of_warp[Cfg::kKeyGroups];
    float4 x[Cfg::kKeyGroups];
#pragma unroll
    for (int group = 0; group < Cfg::kKeyGroups; ++group) {
      const int warp = group * Cfg::kRowWarps + row / 16;
      of_warp[group] = statistics[warp * 16 + row % 16];
      x[group] = *reinterpret_cast<const float4*>(entry(warp, row % 8, col));
    }
    Sum total;
    total.add(of_warp, x);
    return total;
  }
};

// Eight rows of every warp leave.
template <class Cfg, int half, class Put>
__device__ inline void finish_rows(const WarpRows<Cfg>& from, int rows, int cols, int thread,
                                   const Put& put) {
  constexpr int kQuads = Cfg::kHeadDim / 4;
  for (int at = thread; at < Cfg::kRowWarps * 8 * kQuads; at += Cfg::kThreads) {
    const int col = at % kQuads * 4;
    const int row = at / kQuads / 8 * 16 + 8 * half + at / kQuads % 8;
    if (row < rows && col < cols) put(row, col, from.sum(row, col));
  }
}

// What the CTA has of a pair leaves: as results if that is all of it, else as a part, and the last
// part that comes makes results of all. The CTAs of a cluster merge their parts first, each a piece
// of the rows. Everyone is done with scratch, and with the ring if there are clusters.
template <class Cfg>
__device__ inline void finish(const DecodeParams& params, const attn::Sequence& seq, int head_k,
                              const typename Cfg::AccO& o, typename Cfg::Softmax& softmax,
                              const WarpRows<Cfg>& scratch, Exchange<Cfg> exchange, bool is_whole,
                              const Parts& parts, int cluster, int* flag, int thread) {
  const ForwardParams& call = params.call;
  const int rows = num_rows(params, seq);
  const bool exchanges = cluster > 0 && !is_whole;
  Parts in_memory = parts;
  Quads quads = {0, rows * exchange.kQuads};
  if (exchanges) {
    quads = exchange.open(parts, cluster, rows, thread);
    in_memory = parts.of_clusters(cluster);
  }
  const auto put_result = [&](int r, int col, const Sum& total) {
    const Row row(params, head_k, r);
    store<typename Cfg::T>(call, seq, row, col, total.normalised());
    if (col == 0) store_lse(call, seq, row, total.shift, total.sum);
  };
  const auto put_part = [&](int row, int col, const Sum& total) {
    const PartRows to(params, in_memory);
    to.quad(in_memory.index, row, col) = total.o;
    if (col == 0 || row * exchange.kQuads + col / 4 == quads.begin) {
      to.statistics_of(in_memory.index, row, col) = make_float2(total.shift, total.sum);
    }
  };
  const auto put = [&](int row, int col, const Sum& total) {
    if (is_whole) {
      put_result(row, col, total);
    } else if (exchanges) {
      exchange.put(row, col, total);
    } else {
      put_part(row, col, total);
    }
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    softmax.sum[0][h] += __shfl_xor_sync(kAllLanes, softmax.sum[0][h], 1);
    softmax.sum[0][h] += __shfl_xor_sync(kAllLanes, softmax.sum[0][h], 2);
  }
  const int cols = exchanges ? Cfg::kHeadDim : call.dv;
  scratch.template put<0>(o, softmax, thread / 32, thread % 32);
  __syncthreads();
  if (exchanges) ptx::cluster_wait();
  finish_rows<Cfg, 0>(scratch, rows, cols, thread, put);
  if (rows > 8) {
    __syncthreads();
    scratch.template put<1>(o, softmax, thread / 32, thread % 32);
    __syncthreads();
    finish_rows<Cfg, 1>(scratch, rows, cols, thread, put);
  }
  if (is_whole) return;
  if (exchanges) {
    const bool is_all = in_memory.count == 1;
    ptx::wait_for_sent(exchange.barrier);
    merge_parts<Cfg>(exchange, exchange.count, quads, call.dv, thread,
                     [&](int row, int col, const Sum& total) {
                       if (is_all) {
                         put_result(row, col, total);
                       } else {
                         put_part(row, col, total);
                       }
                     });
    if (is_all) return;
  }
  const attn::Counter counter{call.next_tile + in_memory.first};
  __syncthreads();
  if (thread == 0) {
    *flag = static_cast<int>(counter.count_in_order()) + 1 == in_memory.count;
  }
  __syncthreads();
  if (*flag == 0) return;
  merge_parts<Cfg>(PartRows(params, in_memory), in_memory.count, quads, call.dv, thread,
                   put_result);
  if (thread == 0) counter.close();
}

}  // namespace flash::decode
