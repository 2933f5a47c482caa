// Where a thread stands in its warpgroup.
#pragma once

#include "ptx/memory.cuh"

namespace flash::sm90 {

// Opaque, so that nothing that is seldom needed is computed ahead and kept.
struct Own {
  __device__ static int thread() { return ptx::opaque(static_cast<int>(threadIdx.x)) % 128; }
  __device__ static int lane() { return thread() % 32; }
  __device__ static int warp_row() { return thread() / 32 * 16; }
};

}  // namespace flash::sm90
