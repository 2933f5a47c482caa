#pragma once

#include "ptx/math.cuh"

namespace flash::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::wait_products(kPending);
}
template <class X>
void pin(X&) {}

template <class T, int kN>
struct Wgmma {
  static void with_rows(float (&c)[kN / 8][4], uint64_t a, uint64_t b, int adds) {
    emulator::start({&c[0][0], kN, nullptr, a, b, false, adds != 0, kFormat<T>});
  }
  static void with_rows(float (&c)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    emulator::start({&c[0][0], kN, a, 0, b, false, adds != 0, kFormat<T>});
  }
  static void with_columns(float (&c)[kN / 8][4], uint64_t a, uint64_t b, int adds) {
    emulator::start({&c[0][0], kN, nullptr, a, b, true, adds != 0, kFormat<T>});
  }
  static void with_columns(float (&c)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    emulator::start({&c[0][0], kN, a, 0, b, true, adds != 0, kFormat<T>});
  }
};

}  // namespace flash::ptx
