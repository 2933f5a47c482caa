// Keys and values on their way to shared memory: a ring of blocks, each warp loads its own rows.
//
// A warp's rows of a block mostly stand one behind the other, in the cache or in a page: then lanes
// go on from where they are. Else rows stand anywhere: every lane finds one row of K or of V in
// front of the copies, and the others get its address by a shuffle. A block's pages are looked up
// when the block in front of it is loaded. New rows never pass through the cache: their warp
// rotates them, stores them to the cache and to the ring.
#pragma once

#include "attn/new_rows.cuh"
#include "decode/work.cuh"
#include "tile/smem_tile.cuh"

namespace flash::decode {

template <class Cfg>
struct KeyRing {
  using TileK = typename Cfg::TileK;
  static constexpr int kLoadRows = Cfg::kBlockN / Cfg::kWarps;  // of a warp, of K and of V
  static constexpr int kRowsPerPass = 32 / TileK::kPanelChunks;
  static constexpr int kPanels = TileK::kCols / TileK::kPanel;
  static constexpr int kStageBytes = Cfg::kKeyGroups * 2 * TileK::kBytes;
  static constexpr uint64_t kNoRow = 0;   // becomes zeros
  static constexpr uint64_t kNewRow = 1;  // is stored by add()
  static_assert(kLoadRows <= 16 && kLoadRows % kRowsPerPass == 0, "a lane finds one row");

  const DecodeParams& params;
  Walk<Cfg> walk;
  const int lane, warp;
  const uint32_t smem;   // of this warp's keys in the first stage
  uint32_t read, write;  // stages, as offsets
  int page, in_page;     // of this lane's row of the next block, as the block table has it
  bool has_runs;     // rows of a block can stand one behind the other, and are as wide as the ring
  int end_of_cache;  // of the pair: from here on slots are filled by new rows, or not at all
  const uint16_t* of_pair[2];  // this lane's first chunk of K and of V in slot 0 of the pair

  __device__ KeyRing(const DecodeParams& params, const Walk<Cfg>& walk, uint32_t smem, int thread)
      : params(params),
        walk(walk),
        lane(thread % 32),
        warp(thread / 32),
        smem(smem + warp / Cfg::kRowWarps * 2 * TileK::kBytes),
        read(0),
        write(0),
        page(0),
        in_page(0) {
    const Sequences& seqs = params.call.seqs;
    has_runs = num_cols(params.call.d) == TileK::kCols &&
               num_cols(params.call.dv) == TileK::kCols &&
               (!seqs.block_table || seqs.page_size % kLoadRows == 0);
    enter();
    look_up();
  }

  // Starts the copies of the next block of the share, if there is one.
  __device__ void start() {
    if (walk.left > 0) {
      if (is_run()) {
        copy_run();
      } else {
        load();
      }
      if (walk.advance(1)) enter();
      look_up();
    }
    ptx::cp_async_commit();
    write = behind(write);
  }

  // Waits for the oldest block; the one in front of it may be overwritten from here on.
  __device__ void wait() const {
    ptx::cp_async_wait<Cfg::kStages - 2>();
    if constexpr (Cfg::kKeyGroups == 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Where it stands, for this warp.
  __device__ uint32_t k() const { return smem + read; }
  __device__ uint32_t v() const { return smem + read + TileK::kBytes; }
  __device__ void pass() { read = behind(read); }

 private:
  __device__ static uint32_t behind(uint32_t stage) {
    return stage == (Cfg::kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
  }

  // Columns of the ring, of 16 bits, that a row of so many elements has.
  __device__ static int num_cols(int head_dim) {
    return Cfg::kIsFp8 ? (head_dim + 15) / 16 * 8 : head_dim;
  }

  __device__ int first_row() const { return warp % Cfg::kRowWarps * kLoadRows; }  // of the tile
  __device__ int first_slot() const { return walk.block * Cfg::kBlockN + warp * kLoadRows; }
  __device__ int slot() const { return first_slot() + lane % 16; }
  __device__ int end_slot() const { return walk.seq.skip + walk.seq.sk; }

  // From here on slots are filled by new rows.
  __device__ int first_new() const {
    return appends(params) ? params.call.seqs.seqused_k[walk.seq.index] : end_slot();
  }

  // Begins with a pair.
  __device__ void enter() {
    if (walk.left == 0) return;
    const ForwardParams& call = params.call;
    end_of_cache = min(first_new(), end_slot());
    const int64_t row = call.seqs.block_table ? 0 : walk.seq.first_k - walk.seq.skip;
    const bool has_batch = !call.seqs.block_table && !call.seqs.cu_seqlens_k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Rows& x = i == 0 ? call.k : call.v;
      const int64_t at = walk.head * x.head + (row + lane / TileK::kPanelChunks) * x.row +
                         (has_batch ? walk.seq.cache_row * x.batch : 0);
      of_pair[i] =
          static_cast<const uint16_t*>(x.ptr) + at + lane % TileK::kPanelChunks * tile::kChunk;
    }
  }

  // Whether all of this warp's rows of the next block are there, one behind the other.
  __device__ bool is_run() const {
    return has_runs && first_slot() >= walk.seq.skip && first_slot() + kLoadRows <= end_of_cache;
  }

  __device__ void copy_run() const {
    const Sequences& seqs = params.call.seqs;
    const int first_page = __shfl_sync(kAllLanes, page, 0);
    const int first_in_page = __shfl_sync(kAllLanes, in_page, 0);
    const uint32_t chunk =
        TileK::offset(first_row() + lane / TileK::kPanelChunks, lane % TileK::kPanelChunks);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Rows& x = i == 0 ? params.call.k : params.call.v;
      const uint16_t* from = of_pair[i];
      if (seqs.block_table) {
        from += clamped(first_page) * x.batch + first_in_page * x.row;
      } else {
        from += first_slot() * x.row;
      }
      const uint32_t to = smem + write + i * TileK::kBytes + chunk;
#pragma unroll
      for (int at = 0; at < kLoadRows; at += kRowsPerPass) {
        // A pass of four rows turns chunks by as many as the one in front, or by four more.
        const uint32_t row = (to ^ at % 8 * 16) + at * (TileK::kPanel * 2);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          ptx::cp_async_16_once(row + panel * TileK::kPanelBytes, from + panel * TileK::kPanel,
                                true);
        }
        from += kRowsPerPass * x.row;
      }
    }
  }

  // An index outside the cache is clamped: nothing outside it is ever read.
  __device__ int64_t clamped(int found) const {
    return min(max(found, 0), params.call.seqs.num_pages - 1);
  }

  // Whether this lane's row is one of the sequence, or new.
  __device__ bool has_slot() const { return lane % 16 < kLoadRows && slot() < end_slot(); }

  __device__ void look_up() {
    const Sequences& seqs = params.call.seqs;
    if (seqs.block_table == nullptr || walk.left == 0 || !has_slot()) return;
    const uint32_t index = static_cast<uint32_t>(slot()) / static_cast<uint32_t>(seqs.page_size);
    in_page = slot() - index * seqs.page_size;
    page = seqs.block_table[walk.seq.cache_row * seqs.block_table_stride + index];
  }

  // This lane's row: of K in the lower half of the warp, of V in the upper one.
  __device__ uint64_t find_row() const {
    if (!has_slot()) return kNoRow;
    if (slot() >= first_new()) return kNewRow;
    if (slot() < walk.seq.skip) return kNoRow;
    const Sequences& seqs = params.call.seqs;
    const Rows& x = lane < 16 ? params.call.k : params.call.v;
    int64_t at = walk.head * x.head;
    if (seqs.block_table) {
      at += clamped(page) * x.batch + in_page * x.row;
    } else {
      at += (seqs.cu_seqlens_k ? 0 : walk.seq.cache_row * x.batch) +
            (walk.seq.first_k - walk.seq.skip + slot()) * x.row;
    }
    return reinterpret_cast<uint64_t>(static_cast<const uint16_t*>(x.ptr) + at);
  }

  __device__ void load() const {
    const uint64_t mine = find_row();
    const bool is_there = mine > kNewRow || lane % 16 >= kLoadRows;
    const int cols_k = num_cols(params.call.d);
    const int cols_v = num_cols(params.call.dv);
    const bool is_full =
        cols_k == TileK::kCols && cols_v == TileK::kCols && __all_sync(kAllLanes, is_there);
    if (is_full) {
      copy<true>(smem + write, mine, 0, TileK::kCols);
      copy<true>(smem + write + TileK::kBytes, mine, 16, TileK::kCols);
      return;
    }
    copy<false>(smem + write, mine, 0, cols_k);
    copy<false>(smem + write + TileK::kBytes, mine, 16, cols_v);
    if (!__any_sync(kAllLanes, mine == kNewRow)) return;
    const int end = min(kLoadRows, end_slot() - first_slot());
    for (int r = max(first_new() - first_slot(), 0); r < end; ++r) add(r);
  }

  // Rows whose addresses lanes [source, + kLoadRows) have. Full: all of them are there.
  template <bool is_full>
  __device__ void copy(uint32_t tile, uint64_t mine, int source, int num_cols) const {
    const int col = lane % TileK::kPanelChunks * tile::kChunk;
#pragma unroll
    for (int at = 0; at < kLoadRows; at += kRowsPerPass) {
      const int r = at + lane / TileK::kPanelChunks;
      const uint64_t from = __shfl_sync(kAllLanes, mine, source + r);
      const uint32_t to = tile + TileK::offset(first_row() + r, lane % TileK::kPanelChunks);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const auto* chunk = reinterpret_cast<const uint16_t*>(from) + col + panel * TileK::kPanel;
        const bool valid = is_full || (from != kNoRow && col + panel * TileK::kPanel < num_cols);
        if (is_full || from != kNewRow) {
          ptx::cp_async_16_once(to + panel * TileK::kPanelBytes, chunk, valid);
        }
      }
    }
  }

  // A new row, to the ring and, if it has such a slot, to the cache.
  __device__ void add(int r) const {
    const NewRows& added = params.added;
    const int sequence = walk.seq.index;
    const int slot = first_slot() + r;
    const int row = slot - first_new();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const bool is_k = i == 0;
      const int width = num_cols(is_k ? params.call.d : params.call.dv);
      const uint32_t tile = smem + write + (is_k ? 0 : TileK::kBytes);
      uint16_t* to = attn::cache_slot(is_k ? params.call.k : params.call.v, params.call.seqs,
                                      sequence, slot, walk.head);
      const auto put = [&](int col, uint4 x) {
        ptx::st_shared_128(tile + TileK::offset(first_row() + r, col / tile::kChunk), x);
        if (to) *reinterpret_cast<uint4*>(to + col) = x;
      };
      const uint16_t* from =
          attn::row_of(is_k ? added.k : added.v, added.cu_seqlens, sequence, row, walk.head);
      if constexpr (Cfg::kIsFp8) {
        attn::move_columns(put, from, 0, width, lane);
      } else {
        const int position =
            is_k ? attn::position_of_key(added, params.call.seqs, sequence, row) : -1;
        attn::move_row<typename Cfg::T>(put, from, width, position, added, lane);
      }
      // Columns behind the head dim.
      const int unused = width / tile::kChunk + lane;
      if (unused < TileK::kCols / tile::kChunk) {
        ptx::st_shared_128(tile + TileK::offset(first_row() + r, unused), make_uint4(0, 0, 0, 0));
      }
    }
  }
};

}  // namespace flash::decode
