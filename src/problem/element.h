// One stored element to and from floating point, for code where speed does not matter.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "blasst/blasst.hpp"

namespace blasst::problem {

// Keys and values of a quantised cache.
inline bool is_8_bits(DType dtype) { return dtype == BLASST_INT8 || dtype == BLASST_FLOAT8_E4M3; }

// Whether scores are made of the keys' own bytes (blasst_scores).
inline bool scores_take_bytes(blasst_scores scores, DType keys) {
  return scores == BLASST_SCORES_INT8 && keys == BLASST_INT8;
}

inline int64_t element_bytes(DType dtype) {
  return dtype == BLASST_FLOAT32 ? 4 : is_8_bits(dtype) ? 1 : 2;
}

inline const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"float32", "float16", "bfloat16", "int8", "float8_e4m3"};
  return names[dtype];
}

inline double load_e4m3(uint8_t bits) {
  const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
  const double sign = bits >> 7 ? -1.0 : 1.0;
  if ((bits & 0x7f) == 0x7f) return std::nan("");
  if (exponent == 0) return sign * std::ldexp(mantissa, -9);
  return sign * std::ldexp(8 + mantissa, exponent - 10);
}

// Rounds to the nearest float8_e4m3, ties to even; what is beyond 448 becomes 448.
inline uint8_t e4m3_bits(float value) {
  const auto sign = static_cast<uint8_t>(std::bit_cast<uint32_t>(value) >> 24 & 0x80);
  if (std::isnan(value)) return sign | 0x7f;
  const double size = std::min(std::abs(static_cast<double>(value)), 448.0);
  if (size < 0x1p-6) return sign | static_cast<uint8_t>(std::nearbyint(size * 0x1p9));
  const int exponent = std::ilogb(size);
  const double mantissa = std::nearbyint(std::ldexp(size, 3 - exponent));  // 8 to 16
  return sign | static_cast<uint8_t>((exponent + 6) * 8 + mantissa);
}

inline double load_half(uint16_t bits) {
  const uint64_t exponent = (bits >> 10) & 31;
  const uint64_t mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * 0x1p-24 * static_cast<double>(mantissa);
  return sign * std::bit_cast<double>((exponent + 1023 - 15) << 52 | mantissa << 42);
}

// Rounds to the nearest half, ties to even.
inline uint16_t half_bits(float value) {
  const auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16 & 0x8000);
  const double size = std::abs(static_cast<double>(value));
  if (std::isnan(value)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24));
  const int exponent = std::ilogb(size);
  const double mantissa = std::nearbyint(std::ldexp(size, 10 - exponent));  // 1024 to 2048
  return sign | static_cast<uint16_t>((exponent + 14) * 1024 + mantissa);
}

inline double load_element(DType dtype, const std::byte* address) {
  if (dtype == BLASST_FLOAT32) {
    float value;
    std::memcpy(&value, address, sizeof value);
    return value;
  }
  if (dtype == BLASST_INT8) return static_cast<int8_t>(*address);
  if (dtype == BLASST_FLOAT8_E4M3) return load_e4m3(static_cast<uint8_t>(*address));
  uint16_t bits;
  std::memcpy(&bits, address, sizeof bits);
  if (dtype == BLASST_FLOAT16) return load_half(bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounds to the nearest bfloat16, ties to even.
inline uint16_t bfloat16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store_element(DType dtype, std::byte* address, float value) {
  if (dtype == BLASST_FLOAT32) {
    std::memcpy(address, &value, sizeof value);
    return;
  }
  if (dtype == BLASST_INT8) {
    *address = std::byte(static_cast<int8_t>(std::nearbyint(std::clamp(value, -128.0f, 127.0f))));
    return;
  }
  if (dtype == BLASST_FLOAT8_E4M3) {
    *address = std::byte{e4m3_bits(value)};
    return;
  }
  const uint16_t bits = dtype == BLASST_FLOAT16 ? half_bits(value) : bfloat16_bits(value);
  std::memcpy(address, &bits, sizeof bits);
}

}  // namespace blasst::problem
