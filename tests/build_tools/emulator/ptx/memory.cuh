#pragma once

#include "emulator.h"

namespace flash::ptx {

inline uint32_t smem_address(const void* ptr) {
  const auto* byte = static_cast<const unsigned char*>(ptr);
  // Where a kernel has an array of its own, that is its shared memory.
  if (byte < emulator::g_smem || byte >= emulator::g_smem + emulator::kSmemBytes) {
    emulator::g_smem = const_cast<unsigned char*>(byte);
  }
  return static_cast<uint32_t>(byte - emulator::g_smem) + emulator::kSmemBase;
}

inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }
inline const uint16_t* opaque(const uint16_t* x) { return x; }

inline void cp_async_16(uint32_t smem, const void* gmem, bool valid) {
  emulator::cp_async(smem, valid ? gmem : nullptr);
}
inline void cp_async_16_once(uint32_t smem, const void* gmem, bool valid) {
  cp_async_16(smem, gmem, valid);
}
inline void cp_async_16_if(bool is_due, uint32_t smem, const void* gmem) {
  if (is_due) cp_async_16(smem, gmem, true);
}
inline void cp_async_4(uint32_t smem, const void* gmem, bool valid) {
  emulator::cp_async(smem, valid ? gmem : nullptr, 4);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

inline void cp_async_arrive(uint32_t barrier) { emulator::cp_async_arrive(barrier); }

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  const emulator::Slots& rows = emulator::exchange({smem});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = static_cast<uint32_t>(rows.of[8 * i + lane / 4][0]);
    memcpy(&r[i], emulator::at(row + lane % 4 * 4, 4), 4);
  }
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  const emulator::Slots& rows = emulator::exchange({smem});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const uint32_t row = static_cast<uint32_t>(rows.of[8 * i + lane % 4 * 2 + j][0]);
      memcpy(reinterpret_cast<unsigned char*>(&r[i]) + 2 * j, emulator::at(row + lane / 4 * 2, 2),
             2);
    }
  }
}

inline uint4 ld_shared_128(uint32_t smem) {
  uint4 x;
  memcpy(&x, emulator::at(smem, 16), 16);
  return x;
}

inline void st_shared_128(uint32_t smem, uint4 x) { memcpy(emulator::at(smem, 16), &x, 16); }

inline void st_shared_32(uint32_t smem, uint32_t x) { memcpy(emulator::at(smem, 4), &x, 4); }

inline float2 ld_shared_v2_f32(uint32_t smem) {
  float2 x;
  memcpy(&x, emulator::at(smem, 8), 8);
  return x;
}

inline uint32_t ld_shared_32(uint32_t smem) {
  uint32_t x;
  memcpy(&x, emulator::at(smem, 4), 4);
  return x;
}
inline float ld_shared_f32(uint32_t smem) {
  float x;
  memcpy(&x, emulator::at(smem, 4), 4);
  return x;
}

inline void st_global_128(void* gmem, uint4 x) { memcpy(gmem, &x, 16); }

inline void st_global_64(uint64_t* gmem, uint64_t x) { *gmem = x; }

inline uint64_t atomic_add(uint64_t* gmem, uint64_t x) {
  const uint64_t before = *gmem;
  *gmem += x;
  return before;
}

inline uint64_t atomic_add_in_order(uint64_t* gmem, uint64_t x) { return atomic_add(gmem, x); }

inline int atomic_compare_exchange(int32_t* gmem, int expected, int x) {
  const int before = *gmem;
  if (before == expected) *gmem = x;
  return before;
}
inline uint64_t atomic_compare_exchange(uint64_t* gmem, uint64_t expected, uint64_t x) {
  const uint64_t before = *gmem;
  if (before == expected) *gmem = x;
  return before;
}

inline void forget() {}
inline void touch(uint32_t) {}
inline void wait_for_kernel_in_front() {}
inline void let_kernel_behind_begin() {}

inline void red_add_f32(float* gmem, float x) { *gmem += x; }

inline int ld_relaxed(const int32_t* gmem) { return *gmem; }

inline int wait_until_either(const int32_t* gmem, int x, int y, uint32_t = 0) {
  emulator::wait_until([=] { return *gmem == x || *gmem == y; }, "a counter in memory");
  return *gmem;
}
inline void wait_until_equal(const int32_t* gmem, int x, uint32_t = 0) {
  wait_until_either(gmem, x, x);
}

inline void red_release_add(int32_t* gmem, int x) { *gmem += x; }

}  // namespace flash::ptx
