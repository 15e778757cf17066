// The tiles and blocks of the prefill kernel. Plain host code.
#pragma once

#include "cuda/core/prefill/params.h"

namespace blasst::cuda::prefill {

// Warpgroups of a block that own rows. Where the softmax is the longer part of a tile, three hide
// it better.
constexpr int warpgroups(int qk_dim) { return qk_dim > 64 ? 2 : 3; }
constexpr int rows_per_block(int qk_dim) { return warpgroups(qk_dim) * kQueryTileRows; }

// Keys a tile. 256-wide heads leave room for 64.
constexpr int tile_keys(int qk_dim) { return qk_dim > 192 ? 64 : 128; }

}  // namespace blasst::cuda::prefill
