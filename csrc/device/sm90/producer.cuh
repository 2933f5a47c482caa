// The warpgroup that computes nothing. Each warp has a role: to plan tiles, to load them, or to
// store what the consumers have computed.
#pragma once

#include "attn/counter.cuh"
#include "attn/line.cuh"
#include "attn/mask.cuh"
#include "attn/schedule.cuh"
#include "attn/sequence.cuh"
#include "sm90/key_blocks.cuh"
#include "sm90/parts.cuh"
#include "sm90/storing.cuh"

namespace flash::sm90 {

// Tiles that this CTA works on: the first is its own, each later one the next that no CTA has. The
// long ones come first (attn/schedule.cuh), so that short ones fill the gaps at the end.
template <class Cfg, class Pipe = Pipeline<Cfg>>
struct Schedule {
  const TmaForwardParams& with_maps;
  const ForwardParams& params;
  const Pipe& pipe;
  using AnyTile = TileOf<Cfg::kServesAll>;
  uint32_t index;
  uint32_t num_sent = 0;
  bool is_first = true;

  __device__ Schedule(const TmaForwardParams& with_maps, const Pipe& pipe)
      : with_maps(with_maps), params(with_maps.call), pipe(pipe) {
    ptx::wait_for_kernel_in_front();  // others wait for a tile, so for that too
  }

  // Fills in the next tile that has rows, or one with `end` 0 if there is none.
  __device__ void next(AnyTile& tile) {
    tile.end = 0;
    while (tile.end == 0) {
      advance();
      if (index >= num_tiles()) return;
      attn::TileIndex at;
      attn::Sequence seq;
      if (params.line) {
        find_in_line(tile, at, seq);
      } else {
        find(tile, at, seq);
      }
      if constexpr (Cfg::kServesAll) {
        if (Cfg::kPairsHeads) at.head = at.head * pipe.ctas() + pipe.rank();
        at.head *= params.heads_of_tile;
        tile.queries = with_maps.own_queries;
        tile.inverse = with_maps.inverse_of_own;
      }
      ptx::forget();  // what is in the tile by now: registers are few
      if (at.block_m * with_maps.tile_queries < seq.sq) describe(at, seq, tile);
    }
  }

 private:
  __device__ uint32_t num_splits() const { return Cfg::kServesAll ? params.num_splits : 1; }

  __device__ uint32_t num_tiles() const { return num_splits() * tiles_of_part(); }
  __device__ uint32_t tiles_of_part() const {
    const uint32_t blocks =
        params.line ? params.line->blocks : params.seqs.b * with_maps.row_blocks;
    return blocks * with_maps.tile_heads;
  }

  // Among as many tiles of each sequence; its parts count like sequences.
  __device__ void find(AnyTile& tile, attn::TileIndex& at, attn::Sequence& seq) const {
    at = attn::TileIndex(index, with_maps.row_blocks, with_maps.tile_heads,
                         num_splits() * params.seqs.b, params.heads_per_section,
                         with_maps.last_section);
    if constexpr (Cfg::kServesAll) {
      tile.split = at.sequence / params.seqs.b;
      at.sequence -= tile.split * params.seqs.b;
    }
    seq = attn::Sequence(params.seqs, at.sequence);
  }

  __device__ void find_in_line(AnyTile& tile, attn::TileIndex& at, attn::Sequence& seq) const {
    const uint32_t heads = with_maps.tile_heads;
    // Parts of a tile come one behind the other, so that those of many keys are first.
    const uint32_t of_parts = num_splits() > 1 ? index / num_splits() : index;
    if constexpr (Cfg::kServesAll) tile.split = index - of_parts * num_splits();
    const uint32_t place = attn::place_of(*params.line, heads, of_parts);
    const LineBlock block = attn::blocks_of(params.line)[place / heads];
    seq = attn::Sequence(params.seqs, block.sequence);
    at.block_m = 0;
    at.head = place - block.first * heads;
    // Short tiles wait for divisions.
    if (seq.sq > with_maps.tile_queries) {
      const int blocks = (seq.sq + with_maps.tile_queries - 1) / with_maps.tile_queries;
      at = attn::TileIndex(at.head, blocks, heads, 1, params.heads_per_section);
    }
    at.sequence = block.sequence;
  }

  // In the end every CTA takes a number that is no tile's; who takes the last closes the counter.
  __device__ void advance() {
    const attn::Counter counter = {params.next_tile};
    const uint32_t first = blockIdx.x / pipe.ctas();
    if (is_first) {
      index = first;
    } else if (!counter.word) {
      index = num_tiles();
    } else if (pipe.rank() > 0) {
      receive();
    } else {
      if (index == first) counter.open(with_maps.call_number);
      const uint32_t taken = counter.count();
      if (taken == num_tiles() - 1) counter.close();
      index = gridDim.x / pipe.ctas() + taken;
      if (pipe.ctas() > 1) send();
    }
    is_first = false;
  }

  // The first CTA of a pair counts for both.
  __device__ void send() {
    if constexpr (Cfg::kMayPair) {
      pipe.next().wait_empty(num_sent);
      ptx::send(ptx::of_cta(pipe.next_tile(num_sent), 1), index,
                ptx::of_cta(pipe.next().full(num_sent), 1));
      ++num_sent;
    }
  }

  __device__ void receive() {
    if constexpr (Cfg::kMayPair) {
      ptx::mbarrier_arrive_expect(pipe.next().full(num_sent), sizeof(index));
      pipe.next().wait_full(num_sent);
      index = ptx::ld_shared_32(pipe.next_tile(num_sent));
      ptx::mbarrier_arrive_there_if(true, pipe.next().empty(num_sent), 0);
      ++num_sent;
    }
  }

  // What the tile of rows from `row0` on takes. Rows that see no key, and a pair's rows that are
  // not there, take a block all the same, and hide it.
  __device__ static attn::Keys blocks_of(const attn::Mask& mask, int row0, int rows, int sq) {
    const int last_row = min(row0 + rows, sq) - 1;
    const int begin = mask.lowest(row0) / Cfg::kBlockN;
    const int end = (max(mask.highest(last_row), 0) + Cfg::kBlockN - 1) / Cfg::kBlockN;
    if (begin < end && row0 < sq) return {begin, end};
    return {0, 1};
  }

  __device__ void describe(const attn::TileIndex& at, const attn::Sequence& seq,
                           AnyTile& tile) const {
    const Sequences& seqs = params.seqs;
    int row0 = at.block_m * with_maps.tile_queries;
    if (!Cfg::kPairsHeads) row0 += pipe.rank() * Cfg::kBlockM;
    tile.sequence = at.sequence;
    tile.head = at.head;
    tile.row0 = row0;
    tile.sq = seq.sq;
    tile.sk = seq.sk;
    tile.first_q = static_cast<int>(seq.first_q);
    tile.batch_q = seqs.cu_seqlens_q ? 0 : seq.index;
    tile.first_k = static_cast<int>(seq.first_k);
    tile.batch_k = seqs.cu_seqlens_k && !seqs.block_table ? 0 : seq.cache_row;
    tile.head_k = attn::key_head(at.head, params.hq, params.hk);

    attn::Mask mask(params.scores, seq.sq, seq.sk);
    const int rows = queries_of(tile) * Cfg::kConsumers;
    attn::Keys own = blocks_of(mask, row0, rows, seq.sq);
    if constexpr (Cfg::kServesAll) {
      own = attn::part_of(own, tile.split, params.num_splits);
      // A part without blocks is one of a sequence without keys.
      if (own.begin >= own.end) {
        own = {0, 1};
        tile.sk = 0;
        mask = attn::Mask(params.scores, seq.sq, 0);
      }
    }
    tile.begin = own.begin;
    tile.end = own.end;
    if (!Cfg::kPairsHeads && pipe.ctas() > 1) {
      const int there = row0 + (pipe.rank() == 0 ? 1 : -1) * Cfg::kBlockM;
      const attn::Keys other = blocks_of(mask, there, rows, seq.sq);
      tile.of_pair = {min(own.begin, other.begin), max(own.end, other.end)};
      tile.shared = {max(own.begin, other.begin), min(own.end, other.end)};
    }
#pragma unroll 1
    for (int consumer = 0; consumer < Cfg::kConsumers; ++consumer) {
      const int first = row0 + queries_of(tile) * consumer;
      const int last = first + queries_of(tile) - 1;
      tile.seen_by_all[consumer] = {mask.lowest(last), mask.highest(first)};
      if (Cfg::kTile.skips_blocks()) {
        const int last_own = min(last, seq.sq - 1);
        const int seen = first <= last_own ? max(mask.in_window(last_own).end, 0) : 0;
        const int unseen = max(tile.end - (seen + Cfg::kBlockN - 1) / Cfg::kBlockN, 0);
        tile.skipped[consumer] = min(unseen, tile.end - tile.begin - 1);
      }
    }
    // Behind the last row of K and V there are zeros; behind a sequence, and behind the last key of
    // a page, there is anything.
    const int num_rows = seqs.cu_seqlens_k ? seqs.total_k : seqs.sk;
    const int left = tile.sk - (tile.end - 1) * Cfg::kBlockN;
    const bool is_cut =
        left < Cfg::kBlockN && (seqs.block_table || tile.first_k + tile.sk < num_rows);
    tile.tail = is_cut ? max(left, 0) : Cfg::kBlockN;
  }
};

__device__ inline Descale descale_of(const ForwardParams& params, const Tile& tile) {
  const auto factor = [&](const Factors& x) {
    return attn::factor_of(x, tile.sequence, tile.head_k);
  };
  return {factor(params.q_descale) * factor(params.k_descale), factor(params.v_descale)};
}

// Rows of Q that belong to no head are zeros. All threads take part, before anything is copied.
template <class Cfg>
__device__ inline void clear_unused_rows(const ForwardParams& params, uint32_t q_buffer) {
  using TileQ = typename Cfg::TileQ;
  if constexpr (Cfg::kServesAll) {
    const int used = 64 / params.heads_of_tile * params.heads_of_tile;
    const int bytes = (64 - used) * 128;
    if (bytes == 0) return;
    for (int i = threadIdx.x * 4; i < Cfg::kConsumers * TileQ::kBytes; i += Cfg::kThreads * 4) {
      const uint32_t panel = i / TileQ::kPanelBytes * TileQ::kPanelBytes;
      if (i - panel >= used * 128) ptx::st_shared_32(q_buffer + i, 0);
    }
    ptx::fence_async_proxy();
  }
}

// Q of a tile, for each consumer as soon as it has read the one before; copied by one lane.
template <class Cfg>
__device__ inline void load_q(const TmaForwardParams& params, const Pipeline<Cfg>& pipe,
                              const TileOf<Cfg::kServesAll>& tile, uint32_t i,
                              bool is_leader = true) {
  using TileQ = typename Cfg::TileQ;
  constexpr int kPanels = TileQ::kCols / 64;
  const int unused = 64 - heads_of_tile<Cfg>(params.call) * queries_of(tile);
#pragma unroll 1
  for (int consumer = 0; consumer < Cfg::kConsumers; ++consumer) {
    // The others do not wait: a tile of one block may have given Q back again before a lane that is
    // late has seen its buffer empty.
    if (!is_leader) continue;
    pipe.q(consumer).wait_empty(i);
    load_tile<TileQ>(pipe.q_buffer(i, consumer), params.q, pipe.q(consumer).full(i), kPanels,
                     tile.first_q + first_query(tile, consumer), tile.head, tile.batch_q,
                     -unused * kPanels * 128, ptx::Keep::kShort);
  }
}

// One lane's work: what the CTA does next. False: there is no more.
template <class Cfg>
__device__ inline bool plan_tile(const TmaForwardParams& params, const Pipeline<Cfg>& pipe,
                                 Schedule<Cfg>& schedule, uint32_t i) {
  constexpr int kShort = 4;  // blocks: planning takes as long as two
  pipe.tiles().wait_empty(i);
  auto& tile = pipe.tile(i);
  schedule.next(tile);
  const bool is_last = tile.end == 0;
  if constexpr (Cfg::kIsFp8) {
    if (!is_last) pipe.descale(i) = descale_of(params.call, tile);
  }
  const bool is_long = tile.end - tile.begin > kShort;
  pipe.tiles().arrive_full(i);
  if constexpr (Cfg::kTile.plans_q) {
    if (!is_last) load_q(params, pipe, tile, i);
  }
  // No tile is taken while a long one waits: another CTA may be free sooner.
  if (!is_last && (Cfg::kTile.plans_q || is_long)) pipe.begun().wait_full(i);
  return !is_last;
}

template <class Cfg>
__device__ inline void plan_tiles(const TmaForwardParams& params, const Pipeline<Cfg>& pipe) {
  Schedule<Cfg> schedule(params, pipe);
  for (uint32_t i = 0; plan_tile(params, pipe, schedule, i); ++i) {
  }
}

// K, V and Q in the order in which the consumers take them: the work of one lane, or of a warp
// where a `Block` of keys is. V stays one block behind K, from tile to tile too: a block's scores
// come before its product with V.
template <class Cfg, class Block>
__device__ inline void load_tiles(const TmaForwardParams& params, const Pipeline<Cfg>& pipe,
                                  int lane) {
  constexpr int kPanels = Cfg::TileK::kCols / 64;
  // Columns of V behind its head dim meet columns of O that nobody stores.
  constexpr int kPanel = 128 / Cfg::kElementBytes;
  const int panels_v = min((params.call.dv + kPanel - 1) / kPanel, kPanels);
  ptx::tma_prefetch(params.q);
  ptx::tma_prefetch(params.k);
  ptx::tma_prefetch(params.v);

  uint32_t block = 0;  // blocks of K so far
  Block last;
  const auto load_last_v = [&] {
    if (block == 0) return;
    pipe.v_in().wait_empty(block - 1);
    last.load(pipe.v_in_buffer(block - 1), params.v, pipe.v_in().full(block - 1), panels_v);
  };
  for (uint32_t i = 0;; ++i) {
    pipe.tiles().wait_full(i);
    const auto& tile = pipe.tile(i);
    if (tile.end == 0) break;
    if (Block::is_leader(lane)) pipe.begun().arrive_full(i);
    for (int j = Block::end(tile) - 1; j >= Block::begin(tile); --j) {
      const Block now(params.call.seqs, tile, j, lane);
      pipe.k().wait_empty(block);
      now.load(pipe.k_buffer(block), params.k, pipe.k().full(block), kPanels);
      const bool is_first = j == Block::end(tile) - 1;
      // Where the next Q waits for this tile's last scores, it must not hold up the last V.
      if (!is_first || !Cfg::kIsJoined) load_last_v();
      if (is_first) {
        if constexpr (!Cfg::kTile.plans_q) load_q(params, pipe, tile, i, Block::is_leader(lane));
        if (Cfg::kIsJoined) load_last_v();
      }
      last = now;
      ++block;
    }
    Block::join();
    if (Block::is_leader(lane)) pipe.tiles().arrive_empty(i);
  }
  load_last_v();
}

// The same by a warp, for keys in rows or in pages.
template <class Cfg>
__device__ inline void load_tiles(const TmaForwardParams& params, const Pipeline<Cfg>& pipe,
                                  int lane) {
  using TileK = typename Cfg::TileK;
  if constexpr (Cfg::kTile.takes_pages()) {
    if (params.call.seqs.block_table) {
      load_tiles<Cfg, BlockOfPages<TileK>>(params, pipe, lane);
      return;
    }
  }
  if constexpr (Cfg::kMayPair) {
    if (pipe.ctas() > 1) {
      if (lane == 0) load_tiles<Cfg, BlockOfPair<TileK>>(params, pipe, 0);
      return;
    }
  }
  if (lane == 0) load_tiles<Cfg, BlockOfRows<TileK>>(params, pipe, 0);
}

// The work of both in one warp, where others transpose V. It plans two tiles ahead.
template <class Cfg>
__device__ inline void plan_and_store_tiles(const TmaForwardParams& params,
                                            const Pipeline<Cfg>& pipe, int lane) {
  Schedule<Cfg> schedule(params, pipe);
  uint32_t planned = 0;
  bool has_more = true;
  if (lane == 0) ptx::tma_prefetch(params.o);
  for (uint32_t i = 0;; ++i) {
    if (lane == 0) {
      while (has_more && planned < i + 3) has_more = plan_tile(params, pipe, schedule, planned++);
    }
    __syncwarp();
    pipe.tiles().wait_full(i);
    if (pipe.tile(i).end == 0) break;
    store_tile<1>(params, pipe, i, 0, lane);
  }
  if (lane == 0) ptx::tma_store_wait();
}

}  // namespace flash::sm90
