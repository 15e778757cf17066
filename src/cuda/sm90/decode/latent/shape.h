// Decode over latents (MLA): the sizes, and how the keys of a request are cut. Plain host code.
//
// A token is one row of 576 elements: a latent of 512, which is its value too, and the rotary part
// of its key. All query heads share it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/core/decode/params.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::decode::latent {

inline constexpr int kQkDim = 576, kValueDim = 512;
inline constexpr int kMostRows = 64;  // query rows that decide together, those of a block

constexpr bool is_latent(int64_t value_dim) { return value_dim == kValueDim; }

inline constexpr int kSlots =
    132;  // blocks that one request is spread over: one on each of 132 SMs
inline constexpr int kLeastSplitTiles = 16;

// A split is at least this many tiles: its result, `rows` rows of 512 in float32, is then less than
// a thirtieth of its keys' bytes.
constexpr int least_split_tiles(int rows) { return std::max(kLeastSplitTiles, rows); }

// For each of the parts in which a request's query heads decide.
inline int most_splits(int parts) { return ceil_div(kSlots, parts); }

// Of a work item: four splits of the least size.
constexpr int most_item_tiles(int rows) { return 4 * least_split_tiles(rows); }

}  // namespace blasst::cuda::decode::latent
