// Storing one element, and how exactly a type stores.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/element.h"
#include "blasst/blasst.hpp"

namespace blasst::check {

using attention::element_bytes;
using attention::half_bits;
using attention::load_element;

// Largest relative error of rounding to the type.
inline double unit_roundoff(DType dtype) {
  return dtype == BLASST_FLOAT32 ? 0x1p-24 : dtype == BLASST_FLOAT16 ? 0x1p-11 : 0x1p-8;
}

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
  const uint16_t bits = dtype == BLASST_FLOAT16 ? half_bits(value) : bfloat16_bits(value);
  std::memcpy(address, &bits, sizeof bits);
}

// The nearest value that the type has.
inline float rounded(DType dtype, float value) {
  std::byte element[4];
  store_element(dtype, element, value);
  return static_cast<float>(load_element(dtype, element));
}

}  // namespace blasst::check
