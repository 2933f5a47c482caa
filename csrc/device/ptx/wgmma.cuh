// Products of a warpgroup: 64 rows of A by kN columns of B, over a depth of 16, asynchronously; of
// 8-bit elements over 32, which fill the same registers and bytes.
//
// B, and A or not, are read from shared memory through descriptors.
// Accumulators are laid out as those of mma.m16n8k16 for each warp's 16 rows
// (tile/accumulators.cuh), and A from registers as its A operand. From wgmma_fence() to the end of
// wgmma_wait() nothing else may touch accumulators or A registers; pin() keeps the compiler from
// it.
#pragma once

#include "ptx/math.cuh"

namespace flash::ptx {

// Before the first product that uses registers which were written otherwise.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` groups are still under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers as they are here: reads and writes do not move past this line.
template <int kN>
__device__ inline void pin(float (&c)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3]));
  }
}

template <int kN>
__device__ inline void pin(uint32_t (&a)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3]));
  }
}

// c += A B, or c = A B where `adds` is 0.
//   with_rows:       A and B by rows of shared memory along the depth: A B^T of two tiles
//   with_rows(a):    the same with A in registers
//   with_columns:    A by rows, B by columns: A B of two tiles
//   with_columns(a): the same with A in registers
template <class T, int kN>
struct Wgmma;

// PTX wants every register by number.
#define FLASH_NAMES_64                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH_NAMES_80 FLASH_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH_NAMES_96 FLASH_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASH_NAMES_128 \
  FLASH_NAMES_96        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH_NAMES_192                                                                     \
  FLASH_NAMES_128                                                                           \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASH_NAMES_224                                                                      \
  FLASH_NAMES_192                                                                            \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111"
#define FLASH_NAMES_256                                                                    \
  FLASH_NAMES_224                                                                          \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
#define FLASH_C1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FLASH_C4(n) FLASH_C1(n), FLASH_C1(n + 1), FLASH_C1(n + 2), FLASH_C1(n + 3)
#define FLASH_OPERANDS_64 FLASH_C4(0), FLASH_C4(4)
#define FLASH_OPERANDS_80 FLASH_OPERANDS_64, FLASH_C1(8), FLASH_C1(9)
#define FLASH_OPERANDS_96 FLASH_OPERANDS_64, FLASH_C4(8)
#define FLASH_OPERANDS_128 FLASH_OPERANDS_96, FLASH_C4(12)
#define FLASH_OPERANDS_192 FLASH_OPERANDS_128, FLASH_C4(16), FLASH_C4(20)
#define FLASH_OPERANDS_224 FLASH_OPERANDS_192, FLASH_C4(24)
#define FLASH_OPERANDS_256 FLASH_OPERANDS_224, FLASH_C4(28)

// TYPE with the depth as the instruction spells it, A_BY and B_BY: how it says that an operand lies
// by rows; X0 to X5: numbers of the operands behind the accumulators.
#define FLASH_WITH_ROWS(TYPE, A_BY, B_BY, N, X0, X1, X2, X3, X4, X5)                         \
  __device__ static void with_rows(float (&c)[N / 8][4], uint64_t a, uint64_t b, int adds) { \
    asm volatile("{.reg .pred adds; setp.ne.s32 adds, " X2                                   \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #N TYPE " {" FLASH_NAMES_##N       \
                 "}, " X0 ", " X1 ", adds, 1, 1" A_BY B_BY ";}"                              \
                 : FLASH_OPERANDS_##N                                                        \
                 : "l"(a), "l"(b), "r"(adds));                                               \
  }                                                                                          \
  __device__ static void with_rows(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, \
                                   int adds) {                                               \
    asm volatile("{.reg .pred adds; setp.ne.s32 adds, " X5                                   \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #N TYPE " {" FLASH_NAMES_##N       \
                 "}, {" X0 ", " X1 ", " X2 ", " X3 "}, " X4 ", adds, 1, 1" B_BY ";}"         \
                 : FLASH_OPERANDS_##N                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));           \
  }

#define FLASH_WGMMA(TAG, TYPE, N, X0, X1, X2, X3, X4, X5)                                         \
  template <>                                                                                     \
  struct Wgmma<TAG, N> {                                                                          \
    FLASH_WITH_ROWS("k16.f32." TYPE "." TYPE, ", 0", ", 0", N, X0, X1, X2, X3, X4, X5)            \
    __device__ static void with_columns(float (&c)[N / 8][4], uint64_t a, uint64_t b, int adds) { \
      asm volatile("{.reg .pred adds; setp.ne.s32 adds, " X2                                      \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE           \
                   " {" FLASH_NAMES_##N "}, " X0 ", " X1 ", adds, 1, 1, 0, 1;}"                   \
                   : FLASH_OPERANDS_##N                                                           \
                   : "l"(a), "l"(b), "r"(adds));                                                  \
    }                                                                                             \
    __device__ static void with_columns(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, \
                                        int adds) {                                               \
      asm volatile("{.reg .pred adds; setp.ne.s32 adds, " X5                                      \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE           \
                   " {" FLASH_NAMES_##N "}, {" X0 ", " X1 ", " X2 ", " X3 "}, " X4                \
                                        ", adds, 1, 1, 1;}"                                       \
                   : FLASH_OPERANDS_##N                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));              \
    }                                                                                             \
  };
#define FLASH_WGMMA_OF(TAG, TYPE)                                         \
  FLASH_WGMMA(TAG, TYPE, 64, "%32", "%33", "%34", "%35", "%36", "%37")    \
  FLASH_WGMMA(TAG, TYPE, 80, "%40", "%41", "%42", "%43", "%44", "%45")    \
  FLASH_WGMMA(TAG, TYPE, 96, "%48", "%49", "%50", "%51", "%52", "%53")    \
  FLASH_WGMMA(TAG, TYPE, 128, "%64", "%65", "%66", "%67", "%68", "%69")   \
  FLASH_WGMMA(TAG, TYPE, 192, "%96", "%97", "%98", "%99", "%100", "%101") \
  FLASH_WGMMA(TAG, TYPE, 256, "%128", "%129", "%130", "%131", "%132", "%133")

FLASH_WGMMA_OF(Half, "f16")
FLASH_WGMMA_OF(Bfloat16, "bf16")

// Of 8-bit elements both operands lie by rows.
#define FLASH_WGMMA_E4M3(N, X0, X1, X2, X3, X4, X5)                         \
  template <>                                                               \
  struct Wgmma<E4m3, N> {                                                   \
    FLASH_WITH_ROWS("k32.f32.e4m3.e4m3", "", "", N, X0, X1, X2, X3, X4, X5) \
  };
FLASH_WGMMA_E4M3(64, "%32", "%33", "%34", "%35", "%36", "%37")
FLASH_WGMMA_E4M3(96, "%48", "%49", "%50", "%51", "%52", "%53")
FLASH_WGMMA_E4M3(128, "%64", "%65", "%66", "%67", "%68", "%69")
FLASH_WGMMA_E4M3(192, "%96", "%97", "%98", "%99", "%100", "%101")
FLASH_WGMMA_E4M3(224, "%112", "%113", "%114", "%115", "%116", "%117")
FLASH_WGMMA_E4M3(256, "%128", "%129", "%130", "%131", "%132", "%133")

#undef FLASH_NAMES_64
#undef FLASH_NAMES_80
#undef FLASH_NAMES_96
#undef FLASH_NAMES_128
#undef FLASH_NAMES_192
#undef FLASH_NAMES_224
#undef FLASH_NAMES_256
#undef FLASH_OPERANDS_64
#undef FLASH_OPERANDS_80
#undef FLASH_OPERANDS_96
#undef FLASH_OPERANDS_128
#undef FLASH_OPERANDS_192
#undef FLASH_OPERANDS_224
#undef FLASH_OPERANDS_256
#undef FLASH_C1
#undef FLASH_C4
#undef FLASH_WITH_ROWS
#undef FLASH_WGMMA
#undef FLASH_WGMMA_E4M3
#undef FLASH_WGMMA_OF

}  // namespace flash::ptx
