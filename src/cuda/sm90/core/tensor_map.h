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

// Boxes of one panel by the three outer dimensions: 128 bytes of a row in the 128-byte swizzle, or
// all of a row of 64 bytes in the 64-byte one. Copies reach into L2 in pieces of `promotion`.
CUtensorMap tensor_map(const Tensor& tensor, Element element, const std::array<Dimension, 3>& outer,
                       CUtensorMapL2promotion promotion);

// The same with boxes of `panels` panels of each row: in shared memory one panel of all the box's
// rows lies behind the other. A box's place is {0, outer[0], outer[1], panel, outer[2]}.
CUtensorMap panels_map(const Tensor& tensor, Element element, const std::array<Dimension, 3>& outer,
                       int panels, CUtensorMapL2promotion promotion);

}  // namespace blasst::cuda
