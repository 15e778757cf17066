// Storing one element, and how exactly a type stores.
#pragma once

#include <cstddef>

#include "attention/element.h"
#include "blasst/blasst.hpp"

namespace blasst::check {

using attention::bfloat16_bits;
using attention::element_bytes;
using attention::half_bits;
using attention::load_element;
using attention::store_element;

// Largest relative error of rounding to the type.
inline double unit_roundoff(DType dtype) {
  return dtype == BLASST_FLOAT32 ? 0x1p-24 : dtype == BLASST_FLOAT16 ? 0x1p-11 : 0x1p-8;
}

// The nearest value that the type has.
inline float rounded(DType dtype, float value) {
  std::byte element[4];
  store_element(dtype, element, value);
  return static_cast<float>(load_element(dtype, element));
}

}  // namespace blasst::check
