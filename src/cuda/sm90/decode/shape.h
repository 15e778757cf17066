// How the keys of a request are cut, by the sizes of its heads. Plain host code.
#pragma once

#include "cuda/core/decode/launch.h"
#include "cuda/core/decode/splits.h"
#include "cuda/sm90/decode/latent/shape.h"

namespace blasst::cuda::decode {

// Of a work item of several splits. Longer ones are slower (0.9x at 72 tiles, where 48 would do,
// 0.92x at 128, 0.65x at 256), probably because blocks that read the KV heads of a request,
// neighbours in memory, drift apart.
inline constexpr int kMostItemTiles = 64;

// rows: that decide together; kv_heads: those, or the parts of them in which query heads decide.
inline SplitRule split_rule(int rows, int kv_heads, int value_dim) {
  if (latent::is_latent(value_dim))
    return {latent::least_split_tiles(rows), latent::most_splits(kv_heads)};
  return {least_split_tiles(rows), most_splits(kv_heads)};
}

}  // namespace blasst::cuda::decode
