// Work of a block: splits of one request and KV head, and the tiles that it scores for them.
#pragma once

#include <cmath>

#include "blasst/blasst.h"
#include "cuda/core/decode/params.h"
#include "cuda/core/decode/queries.cuh"
#include "cuda/core/decode/splits.h"
#include "cuda/core/keys.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::decode {

// One split, or several.
struct Item {
  int request, kv_head;
  int slot;                  // of its result
  int positions;             // of the request
  int keys;                  // of the request
  int first_key;             // where the request begins in the tensor
  int tile_begin, tile_end;  // of the whole visit
  int split_tiles;
  int begin, end;  // positions in the visit
};

enum TileFlags : int {
  kFirstOfItem = 1,
  kLastOfItem = 2,
  kFirstOfSplit = 4,
  kLastOfSplit = 8,
  kSeed = 16,      // one of the visit's first BLASST_SEED_TILES
  kOnlySeed = 32,  // of another item: only the row maxima are of interest
  kLastSeed = 64,  // of those
  kStop = 128,     // no tile: the end of the block's work
};

// The index-th item of the launch; false if the request has no such item.
__device__ __forceinline__ bool find_item(const Params& p, const Plan& plan, int index,
                                          Item& item) {
  const ItemPlace place = place_of(index, plan.item_slots, p.kv_heads);
  item.slot = index;
  item.request = place.request;
  item.kv_head = place.kv_head;
  item.positions = rows_of_request(p, item.request).count;
  const Span keys = keys_of_request(p.keys, item.request);
  item.keys = keys.count;
  item.first_key = keys.first;
  const Range tiles = visit(item.keys, item.positions, p.distances);
  item.tile_begin = tiles.begin, item.tile_end = tiles.end;
  const int count = tiles.end - tiles.begin;
  item.split_tiles = split_tiles(count, plan.least_split_tiles, plan.most_splits);
  const int item_tiles = item.split_tiles * plan.item_splits;
  item.begin = place.item * item_tiles;
  item.end = min(count, item.begin + item_tiles);
  return item.begin < item.end;
}

// What an item scores: the first tiles of the whole visit, if it begins later, and its own.
struct Step {
  int position;  // in the visit
  int flags;
};
__device__ __forceinline__ int seeds_of(const Item& item) {
  return item.begin > 0 ? BLASST_SEED_TILES : 0;
}
__device__ __forceinline__ int steps_of(const Item& item) {
  return seeds_of(item) + item.end - item.begin;
}
__device__ __forceinline__ Step step_of(const Item& item, int i) {
  const int seeds = seeds_of(item), last = steps_of(item) - 1;
  const int position = i < seeds ? i : item.begin + i - seeds;
  int flags =
      (i == 0) * kFirstOfItem | (i == last) * kLastOfItem | (position < BLASST_SEED_TILES) * kSeed;
  if (i < seeds) {
    flags |= kOnlySeed | (i == seeds - 1) * kLastSeed;
  } else {
    const int of_split = (position - item.begin) % item.split_tiles;
    flags |= (of_split == 0) * kFirstOfSplit;
    flags |= (of_split == item.split_tiles - 1 || i == last) * kLastOfSplit;
  }
  return {position, flags};
}

// Query rows of the item; group: query heads of a KV head.
__device__ __forceinline__ int rows_of(const Item& item, int group) {
  return item.positions * group;
}

// The keys that a row of the item sees.
__device__ __forceinline__ Range range_of(const Params& p, const Item& item, int group, int row) {
  const int position = item.keys - item.positions + row / group;
  return keys_seen(position, position, p.distances, item.keys);
}

// The threshold of a row; 0 without a test.
__device__ __forceinline__ float threshold_of(const Params& p, const Item& item, int row) {
  if (p.test.kind == BLASST_TEST_NONE) return 0;
  const int group = p.heads / p.kv_heads;
  const int head = item.kv_head * group + row % group;
  return p.test.values[item.request * p.test.stride_request + head * p.test.stride_head];
}

// What the tested value of a row must stay below for a skip, as scores are kept.
__device__ __forceinline__ float skip_limit(const Params& p, const Plan& plan, const Item& item,
                                            int row, float threshold) {
  if (row >= rows_of(item, p.heads / p.kv_heads)) return INFINITY;  // no row: allows every skip
  return log_threshold(p.test.kind, threshold, item.keys) / plan.unit_scale;
}

}  // namespace blasst::cuda::decode
