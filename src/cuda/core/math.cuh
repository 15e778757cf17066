// Arithmetic of the kernels on every architecture.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace blasst::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if either is NaN, unlike fmaxf.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Four numbers of a magnitude up to 127, each rounded to the nearest integer, ties to even, as
// signed bytes. By an addition, which leaves the integer in the lowest bits: conversions take four
// times as long.
__device__ __forceinline__ uint32_t round_to_bytes(float a, float b, float c, float d) {
  constexpr float kUnits = 3 << 22;  // 1.5 * 2^23: the last bit of a float is 1
  const uint32_t low = __byte_perm(__float_as_uint(a + kUnits), __float_as_uint(b + kUnits), 0x40);
  const uint32_t high = __byte_perm(__float_as_uint(c + kUnits), __float_as_uint(d + kUnits), 0x40);
  return __byte_perm(low, high, 0x5410);
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
}
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// tanh to float32's precision in absolute terms.
__device__ __forceinline__ float tanh_exact(float x) {
  return 1 - __fdividef(2, 1 + exp2_approx(2 * kLog2e * x));
}

}  // namespace blasst::cuda
