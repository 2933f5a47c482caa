#pragma once

#include "emulator.h"

namespace flash::ptx {

inline void tma_load(uint32_t smem, const TensorMap& map, uint32_t barrier, int col, int row,
                     int head, int batch) {
  emulator::tma_load(smem, map, barrier, {col, row, head, batch});
}
enum class Keep : uint64_t { kShort, kLong };
inline void tma_load(uint32_t smem, const TensorMap& map, uint32_t barrier, int col, int row,
                     int head, int batch, Keep) {
  emulator::tma_load(smem, map, barrier, {col, row, head, batch});
}
inline void tma_load_to_both(uint32_t smem, const TensorMap& map, uint32_t barrier, int col,
                             int row, int head, int batch, Keep) {
  emulator::tma_load(smem, map, barrier, {col, row, head, batch}, 2);
}
inline void bulk_load(uint32_t smem, const void* gmem, int bytes, uint32_t barrier) {
  emulator::bulk_load(smem, gmem, bytes, barrier);
}
inline void tma_store(const TensorMap& map, uint32_t smem, int col, int row, int head, int batch) {
  emulator::tma_store(smem, map, {col, row, head, batch});
}
inline void tma_store_if(bool is_due, const TensorMap& map, uint32_t smem, int col, int row,
                         int head, int batch) {
  if (is_due) tma_store(map, smem, col, row, head, batch);
}
inline void bulk_add(float* gmem, uint32_t smem, int bytes) {
  emulator::bulk_add(gmem, smem, bytes);
}
inline void bulk_store(void* gmem, uint32_t smem, int bytes) {
  emulator::bulk_store(gmem, smem, bytes);
}
inline void tma_store_commit() {}
template <int kCommitted = 0>
inline void tma_store_wait_read() {
  emulator::tma_store_wait();
}
inline void tma_store_wait() { emulator::tma_store_wait(); }
inline void tma_prefetch(const TensorMap&) {}
inline void fence_async_proxy() {}

}  // namespace flash::ptx
