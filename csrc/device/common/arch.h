// What tables of tile sizes must know of an architecture.
#pragma once

namespace flash::common {

#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__ / 10;
#else
constexpr int kArch = 80;
#endif

// Shared memory of an SM of compute capability `cc` (80 for 8.0); a CTA costs 1 KB beyond its own.
constexpr int smem_of_sm(int cc) {
  if (cc == 80 || cc == 87) return 164 * 1024;
  return cc < 90 || cc >= 120 ? 100 * 1024 : 228 * 1024;
}

}  // namespace flash::common
