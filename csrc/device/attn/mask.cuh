// Which keys a query sees: bottom-right aligned causal mask, window and chunks.
#pragma once

#include "host/flash.h"

namespace flash::attn {

// Keys [begin, end).
struct Keys {
  int begin, end;
};

// For one sequence: key j is visible to query i iff lowest(i) <= j < highest(i).
struct Mask {
  int sk;
  int diagonal;  // sk - sq: query i stands at key i + diagonal
  int left, right, chunk;

  __device__ Mask(const Scores& scores, int sq, int sk)
      : sk(sk),
        diagonal(sk - sq),
        left(scores.window_left),
        right(scores.window_right),
        chunk(scores.attention_chunk) {}

  __device__ int chunk_start(int at) const {
    const int index = at >= 0 ? at / chunk : -((chunk - 1 - at) / chunk);
    return index * chunk;
  }

  __device__ int lowest(int i) const {
    int lo = in_window(i).begin;
    if (chunk > 0) lo = max(lo, chunk_start(i + diagonal));
    return lo;
  }

  __device__ int highest(int i) const {
    int hi = in_window(i).end;
    if (chunk > 0) hi = min(hi, chunk_start(i + diagonal) + chunk);
    return hi;
  }

  // The same of both, chunks apart.
  __device__ Keys in_window(int i) const {
    // Compared so that nothing overflows: a window near INT_MAX means none.
    const bool is_bound = right >= 0 && right < sk - i - diagonal;
    return {left >= 0 ? max(0, i + diagonal - left) : 0,
            is_bound ? min(sk, i + diagonal + right + 1) : sk};
  }

  // Key j is visible to queries [first_query(j), end_query(j)) only; both grow with j.
  __device__ int first_query(int j) const {
    int first = 0;
    if (right >= 0 && right < j - diagonal) first = j - diagonal - right;
    if (chunk > 0) first = max(first, chunk_start(j) - diagonal);
    return first;
  }

  __device__ int end_query(int j) const {
    int end = sk - diagonal;
    if (left >= 0 && left < end - 1 - (j - diagonal)) end = j - diagonal + left + 1;
    if (chunk > 0) end = min(end, chunk_start(j) + chunk - diagonal);
    return end;
  }
};

}  // namespace flash::attn
