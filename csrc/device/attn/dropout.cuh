// The dropout stream: the byte of an entry is a pure function of the seed and of the entry's place.
//
// Philox4x32-10 (Salmon et al., SC 2011). One call yields the 16 bytes that a lane needs for a tile
// of 16 rows x 32 columns in accumulator layout; flash_attn/_cpu/philox.py writes the mapping out
// and docs/numerics.md specifies it.
#pragma once

#include "host/flash.h"

namespace flash::attn {

struct Dropout {
  uint32_t key0, key1, offset;
  uint32_t threshold;
  uint32_t head;  // sequence * hq + query head

  __device__ Dropout(const Scores& scores, int head)
      : threshold(scores.keep_threshold), head(head) {
    const uint64_t seed = static_cast<uint64_t>(scores.rng_state[0]);
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
    offset = static_cast<uint32_t>(scores.rng_state[1]);
  }

  // 16 random bytes for this lane of tile (row / 16, col / 32).
  __device__ void bytes(uint32_t (&words)[4], int row, int col, int lane) const {
    uint32_t c0 = static_cast<uint32_t>(col) / 32 * 32 + lane;
    uint32_t c1 = static_cast<uint32_t>(row) / 16;
    uint32_t c2 = head;
    uint32_t c3 = offset;
    uint32_t k0 = key0;
    uint32_t k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t left = static_cast<uint64_t>(c0) * 0xD2511F53u;
      const uint64_t right = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(right);
      c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(left);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }

  // Whether entry (row half, group of 8 columns, parity) of the lane's 16 is kept.
  __device__ bool keeps(const uint32_t (&words)[4], int half, int group, int parity) const {
    const int byte = 8 * half + 2 * group + parity;
    return (words[byte / 4] >> (8 * (byte % 4)) & 0xFFu) <= threshold;
  }
};

}  // namespace flash::attn
