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

// Splits that a block takes one after the other, after one look at the seeds: what lets `blocks`
// blocks end soonest. pairs: requests times parts; splits: that each of them may have.
inline int splits_of_item(int64_t pairs, int splits, int split_tiles, int blocks) {
  constexpr int kMost = 4;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int run = 1; run <= std::min(splits, kMost); ++run) {
    const int64_t items = pairs * ceil_div(splits, run);
    const int64_t rounds = (items + blocks - 1) / blocks;
    // A seed's tile is scored, and no more: half of the work.
    const int64_t tiles = run * split_tiles + (run < splits ? BLASST_SEED_TILES / 2 : 0);
    if (rounds * tiles < least) least = rounds * tiles, best = run;
  }
  return best;
}

}  // namespace blasst::cuda::decode::latent
