// Products of tiles in shared memory by a warpgroup, and how its accumulators leave.
//
// Tiles are cut into panels of 64 columns, whose rows of 128 bytes are swizzled (smem_tile.cuh): as
// TMA writes them and wgmma reads them, if they begin at multiples of 1024 bytes. One tile serves
// as an operand by rows, as in Q K^T, or by columns, as V in P V: only the descriptor differs.
#pragma once

#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tile/products.cuh"

namespace flash::tile {

// A matrix descriptor of wgmma: in its low half where an operand begins and the bytes from panel to
// panel, in its high half the bytes of eight rows and the swizzle, all in units of 16 bytes.
struct Descriptor {
  uint32_t low;

  __device__ Descriptor(uint32_t smem, uint32_t panel_stride)
      : low(panel_stride / 16 << 16 | smem / 16) {}

  // The same, `step` units further. 32 bits take half the instructions that 64 do.
  __device__ uint64_t at(uint32_t step) const {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    constexpr uint64_t kEightRows = uint64_t{8 * 128 / 16} << 32;
    return kSwizzle128 | kEightRows | (low + step);
  }
};

// What a descriptor takes of an address: it has no place for the CTA's number in its cluster.
template <bool may_have_cluster>
__device__ __forceinline__ uint32_t operand(uint32_t smem) {
  return may_have_cluster ? smem & 0xFFFFFF : smem;
}

// How far the descriptor moves in a step of 16 along the depth.
template <class Tile>
constexpr uint32_t step_along_rows(int k) {
  static_assert(Tile::kPanel == 64, "panels of 128 bytes");
  return (k / 4 * Tile::kPanelBytes + k % 4 * 32) / 16;
}
constexpr uint32_t kStepDownColumns = 16 * 128 / 16;

// s = A B^T, or s += A B^T, over kDepth columns: A 64 rows of a tile, B 8 kN rows of a tile.
template <class T, int kDepth, class TileA, class TileB, int kN>
__device__ __forceinline__ void start_abt(Accumulators<1, kN>& s, uint32_t a_smem, uint32_t b_smem,
                                          bool adds = false) {
  // Of operands by rows a step reads one panel: the panel stride is unused.
  const Descriptor a(a_smem, 16);
  const Descriptor b(b_smem, 16);
  ptx::pin(s.c[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    ptx::Wgmma<T, 8 * kN>::with_rows(s.c[0], a.at(step_along_rows<TileA>(k)),
                                     b.at(step_along_rows<TileB>(k)), adds || k > 0);
  }
  ptx::wgmma_commit();
}

// The same with A in registers, loaded by load_a().
template <class T, class TileB, int kN, int kSteps>
__device__ __forceinline__ void start_abt(Accumulators<1, kN>& s, uint32_t (&a)[kSteps][4],
                                          uint32_t b_smem, bool adds = false) {
  const Descriptor b(b_smem, 16);
  ptx::pin(s.c[0]);
  ptx::pin(a);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    ptx::Wgmma<T, 8 * kN>::with_rows(s.c[0], a[k], b.at(step_along_rows<TileB>(k)), adds || k > 0);
  }
  ptx::wgmma_commit();
}

// The same panel by panel, each a group of products, as they come: `wait(i)` waits for panel i. The
// first kHeld panels of A are in registers, the others in shared memory.
template <class T, int kDepth, class TileA, class TileB, int kN, int kHeld, class Wait>
__device__ __forceinline__ void start_abt_by_panels(Accumulators<1, kN>& s,
                                                    uint32_t (&held)[kHeld][4][4], uint32_t a_smem,
                                                    uint32_t b_smem, const Wait& wait) {
#pragma unroll
  for (int i = 0; i < kDepth / 64; ++i) {
    wait(i);
    const uint32_t b = b_smem + i * TileB::kPanelBytes;
    if (i < kHeld) {
      start_abt<T, TileB>(s, held[i], b, i > 0);
    } else {
      start_abt<T, 64, TileA, TileB>(s, a_smem + i * TileA::kPanelBytes, b, i > 0);
    }
  }
}

// 16 rows of a tile from `row` on as A operands of kSteps steps.
template <class Tile, int kSteps>
__device__ __forceinline__ void load_a(uint32_t (&a)[kSteps][4], uint32_t smem, int row, int lane) {
  const uint32_t at = smem + Tile::offset(row + lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(a[k], walk<Tile>(at, 0, 2 * k));
}

// The other way round.
template <class Tile, int kSteps>
__device__ __forceinline__ void store_a(uint32_t smem, const uint32_t (&a)[kSteps][4], int row,
                                        int lane) {
  const uint32_t at = smem + Tile::offset(row + lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) ptx::stmatrix_x4(walk<Tile>(at, 0, 2 * k), a[k]);
}

// c = A B, or c += A B: A 64 rows of a tile, B the first 8 kN columns of a tile whose rows are the
// depth.
template <class T, class TileA, class TileB, int kN>
__device__ __forceinline__ void start_ab(Accumulators<1, kN>& c, uint32_t a_smem, uint32_t b_smem,
                                         bool adds = false) {
  static_assert(TileA::kCols == TileB::kRows, "shapes must agree");
  const Descriptor a(a_smem, 16);
  const Descriptor b(b_smem, TileB::kPanelBytes);
  ptx::pin(c.c[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    ptx::Wgmma<T, 8 * kN>::with_columns(c.c[0], a.at(step_along_rows<TileA>(k)),
                                        b.at(k * kStepDownColumns), adds || k > 0);
  }
  ptx::wgmma_commit();
}

// o = P B, or o += P B: P packed to 16 bits, the first 8 kN columns of as many rows of B.
template <class T, class TileB, int kN, int kSteps>
__device__ __forceinline__ void start_pb(Accumulators<1, kN>& o, uint32_t (&p)[kSteps][4],
                                         uint32_t b_smem, bool adds = true) {
  using Product = ptx::Wgmma<T, 8 * kN>;
  const Descriptor b(b_smem, TileB::kPanelBytes);
  ptx::pin(p);
  ptx::pin(o.c[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    Product::with_columns(o.c[0], p[k], b.at(k * kStepDownColumns), adds || k > 0);
  }
  ptx::wgmma_commit();
}

// o = P B^T, or o += P B^T: P packed, B 8 kN rows of a tile along the depth.
template <class T, class TileB, int kN, int kSteps>
__device__ __forceinline__ void start_pbt(Accumulators<1, kN>& o, uint32_t (&p)[kSteps][4],
                                          uint32_t b_smem, bool adds) {
  const Descriptor b(b_smem, 16);
  ptx::pin(p);
  ptx::pin(o.c[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    ptx::Wgmma<T, 8 * kN>::with_rows(o.c[0], p[k], b.at(step_along_rows<TileB>(k)), adds || k > 0);
  }
  ptx::wgmma_commit();
}

// Accumulators rounded, as A operands of the next product.
template <class T, int kN>
__device__ __forceinline__ void pack(uint32_t (&p)[kN / 2][4], const Accumulators<1, kN>& s) {
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = s.c[0][2 * k + i / 2];
      p[k][i] = ptx::pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
  }
}

// The same of as many columns as `p` has, from 8 `first` on, the two rows times `factor`.
template <class T, int kN, int kSteps>
__device__ __forceinline__ void pack(uint32_t (&p)[kSteps][4], const Accumulators<1, kN>& acc,
                                     const float (&factor)[2], int first) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = acc.c[0][first + 2 * k + i / 2];
      const float f = factor[i % 2];
      p[k][i] = ptx::pack<T>(from[i % 2 * 2] * f, from[i % 2 * 2 + 1] * f);
    }
  }
}

// Rounds accumulators, their two rows times `factor`, into 16 rows of a tile from `row` on.
template <class T, class Tile, int kN>
__device__ __forceinline__ void store_matrix(uint32_t smem, const Accumulators<1, kN>& acc,
                                             const float (&factor)[2], int row, int lane) {
  uint32_t packed[kN / 2][4];
  pack<T>(packed, acc, factor, 0);
  store_a<Tile>(smem, packed, row, lane);
}

// The same straight to global memory, as far as rows and columns are wanted. Of 32 columns in a row
// each of four lanes has two in every eight; it gets all of eight, to store them at once.
template <class T, int kN>
__device__ __forceinline__ void store_rows(uint16_t* to, int64_t row_stride,
                                           const Accumulators<1, kN>& acc, const float (&factor)[2],
                                           int num_rows, int num_cols, int lane) {
  const bool is_odd = lane & 1;
  const bool is_high = lane & 2;
  const auto swap = [](uint32_t x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    uint16_t* chunk = to + row * row_stride + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = acc.c[0][n + i];
        r[i] = ptx::pack<T>(from[2 * h] * factor[h], from[2 * h + 1] * factor[h]);
      }
      // Between the lanes of a pair, then between pairs.
      const uint32_t low = swap(is_odd ? r[0] : r[1], 1);
      const uint32_t high = swap(is_odd ? r[2] : r[3], 1);
      const uint2 first = is_odd ? make_uint2(low, r[1]) : make_uint2(r[0], low);
      const uint2 second = is_odd ? make_uint2(high, r[3]) : make_uint2(r[2], high);
      const uint2 other =
          make_uint2(swap(is_high ? first.x : second.x, 2), swap(is_high ? first.y : second.y, 2));
      const uint4 all = is_high ? make_uint4(other.x, other.y, second.x, second.y)
                                : make_uint4(first.x, first.y, other.x, other.y);
      if (row < num_rows && 8 * n + lane % 4 * 8 < num_cols) {
        ptx::st_global_128(chunk + 8 * n, all);
      }
    }
  }
}

// Stores the transpose of what pack() made of 16 rows: into columns [col, + 16) of a tile.
template <class Tile, int kSteps>
__device__ __forceinline__ void store_transposed(uint32_t smem, const uint32_t (&p)[kSteps][4],
                                                 int col, int lane) {
  const uint32_t at = smem + Tile::offset(lane % 8 + lane / 16 * 8, col / kChunk + lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) ptx::stmatrix_x4_trans(walk<Tile>(at, 16 * k, 0), p[k]);
}

}  // namespace flash::tile
