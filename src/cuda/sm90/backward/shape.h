// The blocks of the backward kernel. Plain host code.
#pragma once

#include "cuda/core/backward/params.h"

namespace blasst::cuda::backward {

// Rows, and keys, that a warpgroup multiplies at once.
inline constexpr int kBlock = kQueryTileRows;
inline constexpr int kWarpgroups = 2;  // of a block of threads, beside the one that loads

// Query rows that pass by a warpgroup's keys at once. Where sums of both gradients fill the
// registers, fewer leave room for their scores.
constexpr int passing_rows(int qk_dim) { return qk_dim == 192 ? 32 : kBlock; }

// Query rows that a block of threads finds the gradients of.
inline constexpr int kRowsPerBlock = kWarpgroups * kBlock;

}  // namespace blasst::cuda::backward
