#pragma once

#include "emulator.h"

namespace flash::ptx {

using emulator::mbarrier_init;
using emulator::mbarrier_wait;
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_arrive(uint32_t barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_if(bool is_due, uint32_t barrier) {
  if (is_due) mbarrier_arrive(barrier);
}

inline bool mbarrier_has_ended(uint32_t barrier, uint32_t parity) {
  return emulator::mbarrier_has_ended(barrier, parity);
}

}  // namespace flash::ptx
