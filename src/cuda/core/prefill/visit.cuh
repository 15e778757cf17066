// What the rows of a query tile see, and the tile at hand.
#pragma once

#include "cuda/core/prefill/work.cuh"
#include "cuda/core/tiles.h"

namespace blasst::cuda::prefill {

// Tiles that a row of the query tile sees.
template <int kKeys>
__device__ __forceinline__ Range visible_tiles(const Work& work, QueryTile q) {
  const Range seen = keys_seen(q.position, q.position + q.rows - 1, work.distances, work.keys);
  const bool any =
      q.rows > 0 && work.distances.least <= work.distances.most && seen.begin < seen.end;
  if (!any) return {0, 0};
  return {seen.begin / kKeys, ceil_div(seen.end, kKeys)};
}

// The tile at hand, and the way to the next.
struct Visit {
  int index;  // among all tiles that were visited: says which stages are its own
  int tile, next_tile, step;
  bool masked;  // its scores were capped or masked, or may have been

  __device__ __forceinline__ void begin(int order, Range tiles) {
    step = order == BLASST_FORWARD ? 1 : -1;
    tile = tile_at(order, tiles, 0);
    next_tile = tile_at(order, tiles, 1);
  }
  __device__ __forceinline__ void next() {
    ++index;
    tile = next_tile;
    next_tile += step;
  }
};

}  // namespace blasst::cuda::prefill
