#pragma once

#include "emulator.h"

namespace flash::ptx {

constexpr bool kHasClusters = true;

using emulator::cluster_arrive;
using emulator::cluster_rank;
using emulator::cluster_size;
using emulator::cluster_wait;

inline uint32_t of_cta(uint32_t smem, int rank) {
  return emulator::of_cta(smem, static_cast<unsigned>(rank));
}

inline void mbarrier_arrive_there_if(bool is_due, uint32_t barrier, int rank) {
  if (is_due) emulator::arrive_there(of_cta(barrier, rank));
}

template <class X>
void send(uint32_t to, X x, uint32_t barrier) {
  emulator::send(to, &x, sizeof(X), barrier);
}

inline void wait_for_sent(uint32_t barrier) { emulator::mbarrier_wait(barrier, 0); }

}  // namespace flash::ptx
