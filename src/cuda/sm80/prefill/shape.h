// The tiles and blocks of the prefill kernel. Plain host code.
#pragma once

#include "cuda/core/prefill/params.h"

namespace blasst::cuda::prefill::sm80 {

// Query tiles of a block. Wide outputs leave registers and shared memory for one.
constexpr int query_tiles(int value_dim) { return value_dim > 128 ? 1 : 2; }
constexpr int rows_per_block(int value_dim) { return query_tiles(value_dim) * kQueryTileRows; }

// Keys a tile: those of the Hopper kernels, so that one calibration serves.
constexpr int tile_keys(int qk_dim) { return qk_dim > 192 ? 64 : 128; }

// Keys whose scores a warp has in registers at once: all of a tile's, or half.
constexpr int step_keys(int qk_dim) { return qk_dim > 192 ? 32 : qk_dim > 64 ? 64 : 128; }

}  // namespace blasst::cuda::prefill::sm80
