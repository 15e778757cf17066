// The tiles and blocks of the prefill kernel. Plain host code.
#pragma once

#include "cuda/core/prefill/params.h"

namespace blasst::cuda::prefill::sm80 {

// Query tiles of a block. Wide outputs leave registers and shared memory for one.
constexpr int query_tiles(int value_dim) { return value_dim > 128 ? 1 : 2; }
constexpr int rows_per_block(int value_dim) { return query_tiles(value_dim) * kQueryTileRows; }

// Keys a tile: those whose scores a warp has in registers at once, two tiles of which, and of their
// values, fit in 99 KiB of shared memory beside the queries.
constexpr int tile_keys(int qk_dim) { return qk_dim > 128 ? 32 : qk_dim > 64 ? 64 : 128; }

}  // namespace blasst::cuda::prefill::sm80
