#pragma once

#include "emulator.h"

namespace flash::ptx {

constexpr bool kHasClusters = true;

using emulator::cluster_arrive;
using emulator::cluster_wait;

inline uint32_t of_cta(uint32_t smem, int rank) {
  return emulator::of_cta(smem, static_cast<unsigned>(rank));
}

template <class X>
void send(uint32_t to, X x, uint32_t barrier) {
  emulator::send(to, &x, sizeof(X), barrier);
}

inline void wait_for_sent(uint32_t barrier) { emulator::mbarrier_wait(barrier, 0); }

}  // namespace flash::ptx
