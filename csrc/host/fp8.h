// Calls over FP8 keys: what kernels make of their operands, and which forward kernels they miss.
#pragma once

#include "host/flash.h"

namespace flash::host {

// Rows of 8-bit elements as rows of pairs: kernels that only move them move two as one.
inline Rows in_pairs(const Rows& x) { return {x.ptr, x.batch / 2, x.row / 2, x.head / 2}; }

inline DecodeParams in_pairs(DecodeParams params) {
  ForwardParams& call = params.call;
  Rows* const all[] = {&call.k, &call.v, &params.added.k, &params.added.v};
  for (Rows* x : all) *x = in_pairs(*x);
  if (call.q_dtype == FLASH_E4M3) call.q = in_pairs(call.q);
  return params;
}

inline AppendParams in_pairs(AppendParams params) {
  Rows* const all[] = {&params.k, &params.v, &params.added.k, &params.added.v};
  for (Rows* x : all) *x = in_pairs(*x);
  params.d /= 2;
  params.dv /= 2;
  return params;
}

// What the forward kernels for FP8 keys do not take of a call, so that decode kernels alone can run
// it; null: nothing.
inline const char* misses_fp8_forward(const ForwardParams& params) {
  if (params.q_dtype != FLASH_E4M3) return "queries of 16 bits";
  return params.seqs.block_table != nullptr ? "a block_table" : nullptr;
}

}  // namespace flash::host
