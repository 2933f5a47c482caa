// Whole numbers.
#pragma once

#include <stdint.h>

namespace flash::host {

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline int clamp(int64_t x, int64_t low, int64_t high) {
  const int64_t clamped = x > high ? high : x;
  return static_cast<int>(clamped < low ? low : clamped);
}

inline int wider(int x, int y) { return x > y ? x : y; }

}  // namespace flash::host
