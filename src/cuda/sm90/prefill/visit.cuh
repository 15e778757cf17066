// What a consumer warpgroup knows of its rows and of the tile at hand.
#pragma once

#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ptx.cuh"
#include "cuda/sm90/prefill/config.cuh"

namespace blasst::cuda::prefill {

// Where a thread's scores are (core/fragment.cuh): rows of its warp's 16, columns of every 8.
struct ThreadPlace {
  const int warpgroup = ptx::warp_uniform(threadIdx.x / 128) - 1;
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int row(int r) const {
    return threadIdx.x % 128 / 32 * 16 + lane() / 4 + 8 * r;
  }
  __device__ __forceinline__ int column() const { return 2 * (lane() % 4); }
};

// Tiles that a row of the query tile sees.
template <int kKeys>
__device__ __forceinline__ Range visible_tiles(const Work& work, QueryTile q) {
  const Range seen = keys_seen(q.position, q.position + q.rows - 1, work.distances, work.keys);
  const bool any =
      q.rows > 0 && work.distances.least <= work.distances.most && seen.begin < seen.end;
  if (!any) return {0, 0};
  return {seen.begin / kKeys, ceil_div(seen.end, kKeys)};
}

// Tiles of which every row sees every key. Rows beyond the request see none.
template <int kKeys>
__device__ __forceinline__ Range whole_tiles(const Work& work, QueryTile q) {
  const int last = q.position + max(q.rows, 1) - 1;
  const int begin = max(0, last - work.distances.most);
  const int end = min(work.keys, q.position - work.distances.least + 1);
  const Range tiles = {ceil_div(begin, kKeys), end / kKeys};
  return q.rows == kQueryTileRows && tiles.begin < tiles.end ? tiles : Range{0, 0};
}

// The tile at hand, and the way to the next.
struct Visit {
  int index;  // among all tiles that this warpgroup has visited: says which stages are its own
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
