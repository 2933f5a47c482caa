// A counter that CTAs of one launch share, in memory that nobody clears beforehand.
#pragma once

#include "ptx/memory.cuh"

namespace flash::attn {

// The high bits hold the call's number, the low ones how often it was counted. Whatever the memory
// held before, it was not this number; and the last to count takes it away again, so that a
// captured call can run another time.
struct Counter {
  uint64_t* word;

  // By every CTA before it counts: the first one makes it a counter.
  __device__ void open(uint64_t call_number) const {
    uint64_t found = 0;  // as a call in front leaves it
    uint64_t before = ptx::atomic_compare_exchange(word, 0, call_number << kCounterBits);
    while (before != found && before >> kCounterBits != call_number) {
      found = before;
      before = ptx::atomic_compare_exchange(word, found, call_number << kCounterBits);
    }
  }

  // How often it was called before.
  __device__ uint32_t count() const { return counted(ptx::atomic_add(word, 1)); }

  // The same; whoever counts last sees what the CTAs did in front of it.
  __device__ uint32_t count_in_order() const { return counted(ptx::atomic_add_in_order(word, 1)); }

  __device__ void close() const { ptx::st_global_64(word, 0); }

 private:
  __device__ static uint32_t counted(uint64_t found) {
    return static_cast<uint32_t>(found) & ((1u << kCounterBits) - 1);
  }
};

}  // namespace flash::attn
