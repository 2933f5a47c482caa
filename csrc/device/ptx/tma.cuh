// Copies of boxes of tensors by the tensor memory accelerator, one instruction a function.
#pragma once

#include "host/flash.h"

namespace flash::ptx {

// Copies the box at (col, row, head, batch) to shared memory; its bytes count at `barrier`. What
// lies outside the tensor becomes zero, and counts too.
__device__ inline void tma_load(uint32_t smem, const TensorMap& map, uint32_t barrier, int col,
                                int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// What L2 does with lines: gives them up before others, or after. The values are those that
// `createpolicy` makes for all of a copy.
enum class Keep : uint64_t { kShort = 0x12F0000000000000, kLong = 0x14F0000000000000 };

__device__ inline void tma_load(uint32_t smem, const TensorMap& map, uint32_t barrier, int col,
                                int row, int head, int batch, Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// The same to both CTAs of a cluster of two, to the same place in each, where a barrier at the same
// place counts it.
__device__ inline void tma_load_to_both(uint32_t smem, const TensorMap& map, uint32_t barrier,
                                        int col, int row, int head, int batch, Keep keep) {
  constexpr uint16_t kBoth = 3;
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(batch), "h"(kBoth),
      "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// Copies contiguous bytes, a multiple of 16 at multiples of 16, which count at `barrier`.
__device__ inline void bulk_load(uint32_t smem, const void* gmem, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(gmem), "r"(bytes), "r"(barrier)
      : "memory");
}

// Copies shared memory to the box at (col, row, head, batch), as far as it lies in the tensor.
__device__ inline void tma_store(const TensorMap& map, uint32_t smem, int col, int row, int head,
                                 int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(smem), "r"(col), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same by some threads only, without a branch: control flow stays the same for all.
__device__ inline void tma_store_if(bool is_due, const TensorMap& map, uint32_t smem, int col,
                                    int row, int head, int batch) {
  asm volatile(
      "{.reg .pred due; setp.ne.s32 due, %6, 0;"
      " @due cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], "
      "[%1];}" ::"l"(&map),
      "r"(smem), "r"(col), "r"(row), "r"(head), "r"(batch), "r"(static_cast<int>(is_due))
      : "memory");
}

// Adds floats in shared memory to floats in memory, a multiple of 16 bytes at multiples of 16.
__device__ inline void bulk_add(float* gmem, uint32_t smem, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(gmem),
      "r"(smem), "r"(bytes)
      : "memory");
}

// Copies bytes in the same way.
__device__ inline void bulk_store(void* gmem, uint32_t smem, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(gmem), "r"(smem),
               "r"(bytes)
               : "memory");
}

__device__ inline void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's stores, but for those of the last `kCommitted` groups, have read their
// shared memory.
template <int kCommitted = 0>
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kCommitted) : "memory");
}

// Waits until this thread's stores are done.
__device__ inline void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ inline void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Orders what this thread has done in shared memory before what TMA and wgmma do behind the next
// barrier.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace flash::ptx
