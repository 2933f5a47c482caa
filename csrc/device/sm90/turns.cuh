// Consumers that take turns.
#pragma once

#include "ptx/warpgroup.cuh"

namespace flash::sm90 {

// Warpgroups that issue their products one after the other, so that the softmax of one runs beside
// the products of another.
template <int kConsumers>
struct Turns {
  static constexpr int kFirstBarrier = 1 + kConsumers;
  int consumer;

  __device__ void begin() const {
    if (consumer == kConsumers - 1) pass();
  }
  __device__ void take() const { ptx::named_barrier_sync(kFirstBarrier + consumer, 256); }
  __device__ void pass() const {
    ptx::named_barrier_arrive(kFirstBarrier + (consumer + 1) % kConsumers, 256);
  }
  // The last turn was passed to the first consumer.
  __device__ void end() const {
    if (consumer == 0) take();
  }
};

}  // namespace flash::sm90
