// Arithmetic, one instruction a function. None is volatile, so that ptxas may schedule it freely.
#pragma once

#include "host/flash.h"

namespace flash::ptx {

// The element types, as tags. Values of 16 bits travel as packed pairs, those of 8 as fours; where
// only moves matter, two neighbours of 8 bits are taken for one element of 16.
struct Half {};
struct Bfloat16 {};
struct E4m3 {};

// 2^x; 2^-inf = 0.
__device__ inline float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float lg2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to a pair of 16-bit values; `low` is the first in memory.
template <class T>
__device__ inline uint32_t pack(float low, float high);

template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ inline uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four floats rounded to e4m3; `x0` is the first in memory. What is larger than 448 becomes that.
__device__ inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  uint32_t four;
  asm("{.reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;"
      " cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; mov.b32 %0, {low, high};}"
      : "=r"(four)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return four;
}

// Four e4m3, the first lowest, as two pairs of f16, which hold them exactly.
__device__ inline void unpack_e4m3(uint32_t& low, uint32_t& high, uint32_t four) {
#if __CUDA_ARCH__ >= 890
  asm("{.reg .b16 x, y; mov.b32 {x, y}, %2;"
      " cvt.rn.f16x2.e4m3x2 %0, x; cvt.rn.f16x2.e4m3x2 %1, y;}"
      : "=r"(low), "=r"(high)
      : "r"(four));
#else
  const auto pair = [](uint32_t bytes) {  // in the high halves of 16 bits
    const uint32_t size = (bytes >> 1) & 0x3F803F80u;
    const uint32_t nan = (size + 0x00800080u) & 0x40004000u;
    uint32_t x;
    asm("mul.rn.f16x2 %0, %1, %2;"  // by 256: exponents count from 7, those of f16 from 15
        : "=r"(x)
        : "r"((bytes & 0x80008000u) | size | nan), "r"(0x5C005C00u));
    return x;
  };
  asm("prmt.b32 %0, %1, 0, 0x1404;" : "=r"(low) : "r"(four));
  asm("prmt.b32 %0, %1, 0, 0x3424;" : "=r"(high) : "r"(four));
  low = pair(low);
  high = pair(high);
#endif
}

// Four of the eight bytes of x and y, x having the first: a digit of `bytes` chooses one, the
// lowest digit the first.
template <uint32_t kBytes>
__device__ inline uint32_t choose_bytes(uint32_t x, uint32_t y) {
  uint32_t four;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(four) : "r"(x), "r"(y), "n"(kBytes));
  return four;
}

// The two values of a pair.
template <class T>
__device__ inline float2 unpack(uint32_t pair);

template <>
__device__ inline float2 unpack<Half>(uint32_t pair) {
  float2 x;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(pair));
  return x;
}

template <>
__device__ inline float2 unpack<Bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// c += a b for one m16n8k16 tile: a 16 x 16 by rows, b 16 x 8 by columns, c in float.
template <class T>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);

template <>
__device__ inline void mma_m16n8k16<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_m16n8k16<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace flash::ptx
