#pragma once

#include "emulator.h"

namespace flash::ptx {

struct Half {};
struct Bfloat16 {};

template <class T>
constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<Bfloat16> = true;

inline float ex2(float x) { return exp2f(x); }
inline float rcp(float x) { return 1.0f / x; }
inline float lg2(float x) { return log2f(x); }

template <class T>
uint32_t pack(float low, float high) {
  return emulator::round_to(low, kIsBf16<T>) |
         static_cast<uint32_t>(emulator::round_to(high, kIsBf16<T>)) << 16;
}

template <class T>
float2 unpack(uint32_t pair) {
  return {emulator::to_float(static_cast<uint16_t>(pair), kIsBf16<T>),
          emulator::to_float(static_cast<uint16_t>(pair >> 16), kIsBf16<T>)};
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::Slots& all = emulator::exchange({a[0], a[1], a[2], a[3], b0, b1});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4;
    const int col = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint64_t left = all.of[row * 4 + k % 8 / 2][k / 8 * 2 + i / 2];
      const uint64_t right = all.of[col * 4 + k % 8 / 2][4 + k / 8];
      c[i] += emulator::to_float(static_cast<uint16_t>(left >> (k % 2 * 16)), kIsBf16<T>) *
              emulator::to_float(static_cast<uint16_t>(right >> (k % 2 * 16)), kIsBf16<T>);
    }
  }
}

}  // namespace flash::ptx
