// The blocks of the backward kernel. Plain host code.
#pragma once

#include "cuda/core/backward/params.h"

namespace blasst::cuda::backward {

// Rows, and keys, that a warpgroup multiplies at once.
inline constexpr int kBlock = kQueryTileRows;
inline constexpr int kWarpgroups = 2;  // of a block of threads, beside the one that loads

// Query rows that a block of threads finds the gradients of.
inline constexpr int kRowsPerBlock = kWarpgroups * kBlock;

}  // namespace blasst::cuda::backward
