// Numbers as digits of the type of a cache in 8 bits, so that its keys and values are multiplied as
// they are stored: a product with a number is put together from those with its digits, first the
// most significant one. Each digit of a query row is a column of the product: rows fill a few of
// the tensor core's 8 to 256, and what takes time is the way from memory.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/core/decode/params.h"
#include "cuda/core/math.cuh"
#include "cuda/sm90/core/wgmma.cuh"

namespace blasst::cuda::decode {

inline constexpr int kQueryDigits = 3;
inline constexpr int kProbabilityDigits = 2;

template <Cache kCache>
struct Digits;

// A digit has e4m3's four binary digits. Twelve hold any query element (bf16 has 8, fp16 11) down
// to 2^-15 of its row's largest, less of smaller ones: what is lost is below 2^-25 of that. Eight
// hold a probability as bf16 does, down to 2^-9 of its tile's largest, less of smaller ones: what
// is lost is below 2^-17 of that.
template <>
struct Digits<Cache::kFloat8> {
  using Sum = float;
  template <int kColumns>
  using KeyProduct = ptx::WgmmaFloat8<kColumns>;
  template <int kColumns>
  using ValueProduct = ptx::WgmmaFloat8<kColumns>;
  static constexpr float kBase = 16;        // of queries' digits
  static constexpr int kLargestQuery = 15;  // exponent that a query row's largest element gets
  static constexpr int kOne = 8;            // and that a probability of 1 gets
  // Probabilities' digits are multiplied into one sum: the second one in the first one's units.
  static constexpr int kValueSums = 1;

  static __device__ __forceinline__ float number(float sum) { return sum; }

  static __device__ __forceinline__ void split_queries(const float (&x)[4],
                                                       uint32_t (&digits)[kQueryDigits]) {
    float rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rest[i] = __fmul_rn(x[i], 0x1p-8f);
#pragma unroll
    for (int digit = 0; digit < kQueryDigits; ++digit) {
      asm("{\n.reg .b16 a, b;\n"
          "cvt.rn.satfinite.e4m3x2.f32 a, %2, %1;\n"
          "cvt.rn.satfinite.e4m3x2.f32 b, %4, %3;\n"
          "mov.b32 %0, {a, b};\n}"
          : "=r"(digits[digit])
          : "f"(rest[0]), "f"(rest[1]), "f"(rest[2]), "f"(rest[3]));
      uint32_t pairs[2];
      unpack(digits[digit], pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // without rounding
        const float2 taken = unpack2<__half>(pairs[i / 2]);
        rest[i] = 16 * (rest[i] - (i % 2 == 0 ? taken.x : taken.y));
      }
    }
  }

  static __device__ __forceinline__ void split_probabilities(
      const float (&x)[4], uint32_t (&digits)[kProbabilityDigits]) {
    uint32_t rest[2] = {pack2<__half>(x[0], x[1]), pack2<__half>(x[2], x[3])};
#pragma unroll
    for (int digit = 0; digit < kProbabilityDigits; ++digit) {
      asm("{\n.reg .b16 a, b;\n"
          "cvt.rn.satfinite.e4m3x2.f16x2 a, %1;\n"
          "cvt.rn.satfinite.e4m3x2.f16x2 b, %2;\n"
          "mov.b32 %0, {a, b};\n}"
          : "=r"(digits[digit])
          : "r"(rest[0]), "r"(rest[1]));
      if (digit + 1 == kProbabilityDigits) break;
      uint32_t taken[2];
      unpack(digits[digit], taken);
#pragma unroll
      for (int i = 0; i < 2; ++i)  // without rounding
        asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(rest[i]) : "r"(taken[i]));
    }
  }

 private:
  // Four digits as two pairs of fp16.
  static __device__ __forceinline__ void unpack(uint32_t digits, uint32_t (&pairs)[2]) {
    asm("{\n.reg .b16 a, b;\n"
        "mov.b32 {a, b}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, a;\n"
        "cvt.rn.f16x2.e4m3x2 %1, b;\n}"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "r"(digits));
  }
};

// Fixed point: queries of 22 binary digits and a sign, relative to their row's largest element,
// probabilities of 15, relative to their tile's.
template <>
struct Digits<Cache::kInt8> {
  using Sum = int;
  template <int kColumns>
  using KeyProduct = ptx::WgmmaInt8<kColumns>;
  template <int kColumns>
  using ValueProduct = ptx::WgmmaInt8Uint8<kColumns>;
  static constexpr float kBase = 256;
  static constexpr int kValueSums = kProbabilityDigits;
  static constexpr int kLargestQuery = 21;
  static constexpr int kOne = 15;

  // Of integers up to 2^22, as they are up to 256 elements or 64 keys. By an addition: conversions
  // take four times as long.
  static __device__ __forceinline__ float number(int sum) {
    return __fsub_rn(__int_as_float(sum + 0x4B400000), 0x1.8p23f);
  }

  static __device__ __forceinline__ void split_queries(const float (&x)[4],
                                                       uint32_t (&digits)[kQueryDigits]) {
    int rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rest[i] = __float2int_rn(x[i]);
#pragma unroll
    for (int digit = kQueryDigits - 1; digit >= 0; --digit) {
      digits[digit] = __byte_perm(__byte_perm(rest[0], rest[1], 0x0040),
                                  __byte_perm(rest[2], rest[3], 0x0040), 0x5410);
#pragma unroll
      for (int i = 0; i < 4; ++i) rest[i] = (rest[i] + 128) >> 8;  // a digit is -128 to 127
    }
  }
  static __device__ __forceinline__ void split_probabilities(
      const float (&x)[4], uint32_t (&digits)[kProbabilityDigits]) {
    uint32_t pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)  // the integers' first and second bytes
      pairs[i] = __byte_perm(__float_as_uint(__fadd_rn(x[2 * i], 0x1p23f)),
                             __float_as_uint(__fadd_rn(x[2 * i + 1], 0x1p23f)), 0x5140);
    digits[0] = __byte_perm(pairs[0], pairs[1], 0x7632);
    digits[1] = __byte_perm(pairs[0], pairs[1], 0x5410);
  }
};

template <>
struct Digits<Cache::kInt8Keys> : Digits<Cache::kInt8> {};

// A thread's element of a product, of the sums of all digits side by side.
template <typename D, int kElements, int kSums>
__device__ __forceinline__ float join_digits(const typename D::Sum (&sums)[kSums], int element) {
  float x = D::number(sums[element]);
#pragma unroll
  for (int digit = kElements; digit < kSums; digit += kElements)
    x = __fmaf_rn(x, D::kBase, D::number(sums[digit + element]));
  return x;
}

}  // namespace blasst::cuda::decode
