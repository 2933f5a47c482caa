// Tile sizes of the sm90 family: the one place that knows them, read by the kernels and by the
// host.
#pragma once

namespace flash::sm90 {

constexpr int kBoxM = 64;      // rows of a consumer
constexpr int kNarrowV = 128;  // most columns of V that have kernels beside wider Q and K

// Of keys in pages, the rows that are one copy: the largest power of two that divides page and
// block. Fewer than 8 would cut the pattern in which shared memory is swizzled.
constexpr int kLeastPageRows = 8;
constexpr int rows_of_piece(int page_size, int block_n) {
  return (page_size | block_n) & -(page_size | block_n);
}

// Calls that a kernel serves: all; those whose scores go to softmax as they are (no softcap, no
// ALiBi, a positive scale); of these, long ones, for which wider tiles pay, and those with fewer
// columns of V than of K. What a kernel need not do makes it smaller, and short calls faster.
enum Serves { kAll, kPlain, kLong, kNarrow };

struct ForwardTile {
  Serves serves;
  int head_dim;
  int consumers;  // warpgroups that compute; one more loads and stores
  int block_n;
  int stages;  // buffers of K, and of V: a power of two
  int q_buffers;
  bool holds_q;      // Q goes to registers, and leaves its buffer at once
  bool takes_turns;  // the consumers issue their products one after the other
  // Who plans a tile loads its Q, as soon as there is room; else it comes with the first block.
  bool plans_q = false;
  int element_bytes = 2;  // of Q, K and V
  int narrow_v = 0;       // columns of V and O, where they are fewer than those of Q and K

  constexpr int value_dim() const { return narrow_v > 0 ? narrow_v : head_dim; }
  constexpr int block_m() const { return kBoxM * consumers; }
  // Two CTAs with neighbouring rows may load K and V together. Where Q and O leave room for no more
  // than two short blocks, that is faster than each by itself.
  constexpr bool may_pair() const { return head_dim == 256 && element_bytes == 2; }
  // A block of pages is copied by a warp, each lane a piece of one panel.
  constexpr bool takes_pages() const {
    return element_bytes == 2 && block_n / kLeastPageRows * (columns() / 64) <= 32;
  }
  // Products of 8-bit elements want V by columns: it is transposed in shared memory.
  constexpr bool transposes_v() const { return element_bytes == 1; }
  constexpr int threads() const { return 128 * (1 + consumers); }
  // Of each thread; together no more than the launch has given.
  constexpr int registers_of_consumer() const {
    return consumers == 2 ? 232 : consumers == 4 ? 112 : transposes_v() ? 152 : 160;
  }
  constexpr int registers_of_others() const {
    return consumers == 2 ? 40 : transposes_v() ? 56 : 32;
  }
  // In shared memory: whole panels of 128 bytes. What is moved counts as elements of 16 bits.
  constexpr int columns() const { return (head_dim * element_bytes + 127) / 128 * 64; }
  constexpr int v_in_columns() const { return (value_dim() * element_bytes + 127) / 128 * 64; }
  constexpr int v_columns() const { return (value_dim() + 63) / 64 * 64; }
  constexpr int transposed_bytes() const {
    return transposes_v() ? stages * v_columns() * ((block_n + 127) / 128 * 128) : 0;
  }
  // Where the next Q is there before this tile's last scores are, the next tile's first scores are
  // computed beside this one's last product with V. Four consumers fill each other's gaps: they had
  // better be done with a tile at once.
  constexpr bool is_joined() const { return holds_q || (q_buffers > 1 && consumers == 3); }
  // O has room to leave by, else it leaves in two halves.
  constexpr bool has_o_buffer() const { return head_dim < 256; }
  // P is rounded between exponentials, as soon as the product that reads the last P has ended; else
  // behind them. That pays only where products take long.
  constexpr bool rounds_early() const {
    return head_dim == 128 && element_bytes == 2 && consumers == 2;
  }
  // Of so many keys that a mask seldom hides all of a block.
  constexpr bool has_long_blocks() const { return block_n > 192; }
  // A consumer passes over blocks that none of its rows sees. That costs a gap between two tiles.
  constexpr bool skips_blocks() const { return !holds_q && !has_long_blocks(); }
  // Of a tile's first block no more keys are multiplied, where no row sees more.
  constexpr int few_keys() const { return has_long_blocks() ? 128 : block_n; }
  // Q may come back there.
  constexpr int o_columns() const {
    if (!has_o_buffer()) return v_columns() / 2;
    return holds_q && columns() > v_columns() ? columns() : v_columns();
  }
  // Q, K and V in stages, O; two floats a row; barriers and tiles.
  constexpr int smem_bytes() const {
    return q_buffers * block_m() * columns() * 2 +
           stages * block_n * (columns() + v_in_columns()) * 2 + block_m() * o_columns() * 2 +
           transposed_bytes() + block_m() * 8 + 1024;
  }
};

// Calls, head dim, consumers, keys, buffers of K and of V, buffers of Q, holds Q, takes turns,
// plans Q; bytes of an element, and columns of V. The first that serves is taken.
constexpr ForwardTile kForwardTiles[] = {
    {kLong, 64, 3, 128, 4, 2, false, true},
    {kLong, 96, 3, 96, 2, 1, false, true},
    {kLong, 128, 3, 80, 2, 1, false, false},
    {kPlain, 64, 4, 64, 4, 2, false, true, true},
    {kNarrow, 192, 2, 96, 2, 1, true, true, false, 2, kNarrowV},
    {kAll, 64, 2, 128, 4, 1, true, true},
    {kAll, 96, 2, 128, 2, 1, true, true, true},
    {kAll, 128, 2, 128, 2, 1, true, true, true},
    {kAll, 192, 2, 64, 2, 1, true, true},
    {kAll, 256, 2, 64, 2, 1, false, false, true},
    {kLong, 128, 2, 224, 2, 1, false, false, false, 1},
    {kAll, 64, 3, 128, 2, 1, true, true, false, 1},
    {kAll, 96, 3, 96, 2, 1, true, false, false, 1},
    {kAll, 128, 2, 128, 2, 1, true, false, false, 1},
    {kAll, 192, 2, 96, 2, 1, true, false, false, 1},
    {kAll, 256, 2, 96, 2, 1, false, false, false, 1},
};

constexpr ForwardTile forward_tile(Serves serves, int head_dim, int element_bytes = 2) {
  for (const ForwardTile& tile : kForwardTiles) {
    const bool is_plain = serves == kPlain && tile.serves == kAll;
    if ((tile.serves == serves || is_plain) && tile.head_dim == head_dim &&
        tile.element_bytes == element_bytes) {
      return tile;
    }
  }
  return {};
}

// Attention over a latent: V is wide beside Q and K, and may be multiplied by a second query too.
// Two consumers have the same 64 rows and half of O's columns each; they take blocks of keys in
// turn.
struct LatentTile {
  int value_dim;
  int stages;  // buffers of a block of K and V: a power of two

  static constexpr int kHeadDim = 64;  // of Q and K
  constexpr int block_m() const { return kBoxM; }
  constexpr int block_n() const { return 64; }
  constexpr int threads() const { return 128 * (1 + 2); }
  constexpr int registers_of_consumer() const { return 232; }
  constexpr int registers_of_others() const { return 40; }
  constexpr bool skips_blocks() const { return false; }
  constexpr int columns() const { return kHeadDim + value_dim; }
  // Q and blocks in stages, P; barriers, tiles, and what consumers tell each other.
  constexpr int smem_bytes() const {
    return (block_m() + stages * block_n()) * columns() * 2 + block_m() * block_n() * 2 + 2560;
  }
};

constexpr LatentTile kLatentTiles[] = {{256, 4}, {512, 2}};

constexpr LatentTile latent_tile(int value_dim) {
  for (const LatentTile& tile : kLatentTiles) {
    if (tile.value_dim == value_dim) return tile;
  }
  return {};
}

// How the two consumers of the backward kernel share out the work on a block of keys.
enum Share {
  kByKeys,       // 64 keys each: their dK and dV; shares of dQ are added up in memory
  kByGradients,  // all 64 keys: dV and dK; dQ has a kernel of its own
};

struct BackwardTile {
  int head_dim;
  Share share;
  int block_m;      // queries of a step
  int block_n;      // keys of a CTA
  int stages;       // buffers of Q and dO
  bool has_summer;  // a third consumer multiplies dQ, else both do

  constexpr int consumers() const { return 2; }  // of dK and dV
  constexpr int threads() const { return 128 * (1 + consumers() + has_summer); }
  constexpr int registers_of_consumer() const { return has_summer ? 200 : 240; }
  constexpr int registers_of_summer() const { return 80; }
  constexpr int registers_of_others() const { return 24; }
  // In shared memory: whole panels of 64.
  constexpr int columns() const { return (head_dim + 63) / 64 * 64; }
  // Of P, in float, where one consumer hands it to the other.
  constexpr int p_bytes() const { return share == kByGradients ? block_m * block_n * 4 : 0; }
  // Of dS, where dQ is made of it.
  constexpr int ds_bytes() const { return share == kByKeys ? block_m * block_n * 2 : 0; }
  // Where dQ of a step leaves by TMA, in float: a consumer's part of it, and then its dV, by a
  // sender of its own; or all of it, by two senders in turn.
  constexpr int senders() const { return share == kByKeys ? 2 : 0; }
  constexpr int out_buffers() const { return has_summer ? 1 : senders(); }
  constexpr int out_bytes() const { return 64 * (has_summer ? head_dim : 64) * 4; }
  // The operands of a step outlast it, so that dV and dK of it are multiplied beside S and dP of
  // the next; and K and V of a block stay in registers.
  constexpr bool is_late() const { return share == kByGradients && stages == 3; }
  // A CTA takes block after block, where it can load the next K and V beside this block.
  constexpr bool takes_blocks() const { return share == kByKeys || is_late(); }
  // Of K. Where there are two, dQ of a block's last step is multiplied beside the next block's
  // first.
  constexpr int key_buffers() const { return share == kByKeys ? 2 : 1; }
  constexpr int statistics_bytes() const { return stages * block_m * 2 * 4; }
  constexpr int bounds_bytes() const { return block_n * 2 * 4; }
  // By which sums of dQ are zeroed.
  constexpr int zeros_bytes() const { return share == kByKeys ? 512 : 0; }
  // K and V; Q and dO in stages; two buffers of dS, or of P; what leaves; lse and delta; which
  // queries see a key; zeros; barriers and records.
  constexpr int smem_bytes() const {
    return ((key_buffers() + 1) * block_n + 2 * stages * block_m) * columns() * 2 +
           2 * (ds_bytes() + p_bytes()) + out_buffers() * out_bytes() + statistics_bytes() +
           bounds_bytes() + zeros_bytes() + 512;
  }
};

constexpr BackwardTile kBackwardTiles[] = {
    {64, kByKeys, 128, 128, 2, false},      //
    {96, kByKeys, 64, 128, 2, true},        //
    {128, kByKeys, 64, 128, 2, false},      //
    {192, kByGradients, 64, 64, 3, false},  //
    {256, kByGradients, 64, 64, 2, false},  //
};

constexpr BackwardTile backward_tile(int head_dim) {
  for (const BackwardTile& tile : kBackwardTiles) {
    if (tile.head_dim == head_dim) return tile;
  }
  return {};
}

// The kernel of dQ, where it has one. The same boxes of Q and keys as above are copied at once.
struct QueriesTile {
  int head_dim;
  int block_n;   // keys of a step
  int k_stages;  // buffers of K, and of V: powers of two
  int v_stages;

  constexpr int consumers() const { return 2; }
  constexpr int block_m() const { return kBoxM * consumers(); }
  constexpr int threads() const { return 128 * (1 + consumers()); }
  constexpr int registers_of_consumer() const { return 240; }
  constexpr int registers_of_others() const { return 24; }
  constexpr int columns() const { return (head_dim + 63) / 64 * 64; }
  // Q and dO; K and V in stages; barriers and records.
  constexpr int smem_bytes() const {
    return (2 * block_m() + (k_stages + v_stages) * block_n) * columns() * 2 + 512;
  }
};

constexpr QueriesTile kQueriesTiles[] = {
    {192, 64, 2, 2},  //
    {256, 64, 2, 1},  //
};

constexpr QueriesTile queries_tile(int head_dim) {
  for (const QueriesTile& tile : kQueriesTiles) {
    if (tile.head_dim == head_dim) return tile;
  }
  return {};
}

// Rows of a tile of dQ's sums, and CTAs of the conversion.
constexpr int kSumRows = 64;
constexpr int kConvertThreads = 128;
constexpr int kConvertCtas = 8;  // a multiprocessor

}  // namespace flash::sm90
