// What the copy engine is told of a tensor. Throws Error.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "cuda/core/tensor.h"

namespace blasst::cuda {

// A dimension of a tensor, as the copy engine walks it.
struct Dimension {
  int64_t size, stride;  // in elements
  int box;               // elements a copy
};

// Boxes of one 64-element panel by the three outer dimensions, in the 128-byte swizzle. Copies
// reach into L2 in pieces of `promotion`.
CUtensorMap tensor_map(const Tensor& tensor, Element element, const std::array<Dimension, 3>& outer,
                       CUtensorMapL2promotion promotion);

}  // namespace blasst::cuda
