// Tile sizes of the sm90 family: the one place that knows them, read by the kernels and by the
// host.
#pragma once

namespace flash::sm90 {

constexpr int kConsumers = 2;  // warpgroups that compute, 64 rows each; one more loads and stores
constexpr int kBoxM = 64;
constexpr int kBlockM = kBoxM * kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);

struct ForwardTile {
  int head_dim;
  int block_n;
  int stages;        // buffers of K, and of V: a power of two
  int q_buffers;     // 2: the next tile's scores are computed beside the end of this one
  bool holds_q;      // Q stays in registers
  bool takes_turns;  // the consumers issue their products one after the other

  // In shared memory: whole panels of 64.
  constexpr int columns() const { return (head_dim + 63) / 64 * 64; }
  // Q, whose buffers O leaves through; K and V in stages; barriers and tiles.
  constexpr int smem_bytes() const {
    return (q_buffers * kBlockM + 2 * stages * block_n) * columns() * 2 + 1024;
  }
};

constexpr ForwardTile kForwardTiles[] = {
    {64, 128, 4, 2, true, true},    //
    {96, 128, 2, 2, true, false},   //
    {128, 128, 2, 2, true, false},  //
    {192, 64, 2, 2, true, false},   //
    {256, 64, 2, 1, false, false},  //
};

constexpr ForwardTile forward_tile(int head_dim) {
  for (const ForwardTile& tile : kForwardTiles) {
    if (tile.head_dim == head_dim) return tile;
  }
  return {};
}

}  // namespace flash::sm90
