#pragma once

#include "emulator.h"

namespace flash::ptx {

struct Half {};
struct Bfloat16 {};
struct E4m3 {};

template <class T>
constexpr emulator::Format kFormat = emulator::kHalf;
template <>
inline constexpr emulator::Format kFormat<Bfloat16> = emulator::kBf16;
template <>
inline constexpr emulator::Format kFormat<E4m3> = emulator::kE4m3;

inline float ex2(float x) { return exp2f(x); }
inline float rcp(float x) { return 1.0f / x; }
inline float lg2(float x) { return log2f(x); }

template <class T>
uint32_t pack(float low, float high) {
  return emulator::round_to(low, kFormat<T>) |
         static_cast<uint32_t>(emulator::round_to(high, kFormat<T>)) << 16;
}

inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  const float x[] = {x0, x1, x2, x3};
  uint32_t four = 0;
  for (int i = 0; i < 4; ++i) {
    four |= static_cast<uint32_t>(emulator::round_to(x[i], emulator::kE4m3)) << (8 * i);
  }
  return four;
}

inline void unpack_e4m3(uint32_t& low, uint32_t& high, uint32_t four) {
  const auto half = [four](int i) {
    const float x = emulator::element_of(four, i, emulator::kE4m3);
    return static_cast<uint32_t>(emulator::round_to(x, emulator::kHalf));
  };
  low = half(0) | half(1) << 16;
  high = half(2) | half(3) << 16;
}

template <uint32_t kBytes>
uint32_t choose_bytes(uint32_t x, uint32_t y) {
  const uint64_t all = x | uint64_t{y} << 32;
  uint32_t four = 0;
  for (int i = 0; i < 4; ++i) {
    four |= static_cast<uint32_t>(all >> (8 * (kBytes >> (4 * i) & 7)) & 255) << (8 * i);
  }
  return four;
}

template <class T>
float2 unpack(uint32_t pair) {
  return {emulator::element_of(pair, 0, kFormat<T>), emulator::element_of(pair, 1, kFormat<T>)};
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
      c[i] += emulator::element_of(left, k % 2, kFormat<T>) *
              emulator::element_of(right, k % 2, kFormat<T>);
    }
  }
}

}  // namespace flash::ptx
