#pragma once

#include "emulator.h"

namespace flash::ptx {

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void named_barrier_sync(int barrier, int threads) {
  emulator::barrier_sync(barrier, threads);
}
inline void named_barrier_arrive(int barrier, int threads) {
  emulator::barrier_arrive(barrier, threads);
}
inline bool named_barrier_all(int barrier, int threads, bool x) {
  return emulator::barrier_all(barrier, threads, x);
}

inline int uniform(int x) { return x; }

inline void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
  const emulator::Slots& rows = emulator::exchange({smem});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = static_cast<uint32_t>(rows.of[8 * i + lane / 4][0]);
    memcpy(emulator::at(row + lane % 4 * 4, 4), &r[i], 4);
  }
}

inline void stmatrix_x4_trans(uint32_t smem, const uint32_t (&r)[4]) {
  const emulator::Slots& rows = emulator::exchange({smem});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const uint32_t row = static_cast<uint32_t>(rows.of[8 * i + lane % 4 * 2 + j][0]);
      memcpy(emulator::at(row + lane / 4 * 2, 2), reinterpret_cast<const char*>(&r[i]) + 2 * j, 2);
    }
  }
}

}  // namespace flash::ptx
