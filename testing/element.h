// Storing one element, and how exactly a type stores.
#pragma once

#include <cstddef>

#include "blasst/blasst.hpp"
#include "problem/element.h"

namespace blasst::check {

using problem::bfloat16_bits;
using problem::element_bytes;
using problem::half_bits;
using problem::load_element;
using problem::store_element;

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
