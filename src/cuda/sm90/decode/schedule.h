// How the keys of a request are cut into splits and splits into work. Plain functions, the same on
// the host and in the kernels.
//
// The splits of a request depend on its own length and on the shapes of one request alone, so its
// result has the same bits alone and in any batch. Splits form groups; the results of a group's
// splits are added in order, then the groups'. A work item is one split or one whole group, which
// is a matter of speed: the additions are the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/sm90/decode/params.h"

#if defined(__CUDACC__)
#define BLASST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BLASST_HOST_DEVICE inline
#endif

namespace blasst::cuda::decode {

inline constexpr int kSlots = 264;      // what one request is spread over: two blocks on 132 SMs
inline constexpr int kGroupSplits = 8;  // splits whose results are added before all else
inline constexpr int kLeastSplitTiles = 8;

BLASST_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A split is at least this many tiles: its result, `rows` rows in float32, stays small against its
// keys and values.
BLASST_HOST_DEVICE int least_split_tiles(int rows) {
  return rows > 2 * kLeastSplitTiles ? rows / 2 : kLeastSplitTiles;
}

// A request has at most this many splits for each of its KV heads.
BLASST_HOST_DEVICE int most_splits(int kv_heads) { return ceil_div(kSlots, kv_heads); }

// Tiles a split, for a visit of `tiles` tiles.
BLASST_HOST_DEVICE int split_tiles(int tiles, int least_tiles, int most_splits) {
  const int even = ceil_div(tiles, most_splits);
  return even > least_tiles ? even : least_tiles;
}

// Half-open range of keys or tiles; empty if begin >= end.
struct Range {
  int begin, end;
};

// Keys that some of the request's last `positions` positions sees.
BLASST_HOST_DEVICE Range visible_keys(int keys, int positions, int least, int most) {
  const int begin = keys - positions - most > 0 ? keys - positions - most : 0;
  const int end = least > 0 ? keys - least : keys;
  return {begin, end};
}

BLASST_HOST_DEVICE Range visit(int keys, int positions, int least, int most) {
  const Range seen = visible_keys(keys, positions, least, most);
  if (seen.begin >= seen.end) return {0, 0};
  return {seen.begin / kTileKeys, ceil_div(seen.end, kTileKeys)};
}

// The visit's i-th tile. order: blasst_order.
BLASST_HOST_DEVICE int tile_at(int order, Range tiles, int i) {
  if (order == 0) return tiles.begin + i;                                 // forward
  if (order == 2 && tiles.begin == 0) return i == 0 ? 0 : tiles.end - i;  // sink first
  return tiles.end - 1 - i;                                               // reverse
}

// The most splits of a request of at most `keys` keys.
inline int split_slots(int keys, int least_tiles, int most_splits) {
  return std::max(1, std::min(most_splits, ceil_div(ceil_div(keys, kTileKeys), least_tiles)));
}

// Query rows of the kernel that takes `rows`.
BLASST_HOST_DEVICE constexpr int kernel_rows(int rows) {
  return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
}

// Whether the kernel has registers for the result of a group beside that of a split.
BLASST_HOST_DEVICE constexpr bool adds_splits(int dim, int kernel_rows) {
  return kernel_rows <= 32 && dim * kernel_rows <= 128 * 32;
}

// How many of `pairs` pairs of a request and a KV head, `tiles` tiles each, have whole groups as
// work items: none where results are less than a hundredth of the keys and values that they come
// from. The last pairs have single splits, an item's worth for every block, so that blocks end
// together.
inline int grouped_pairs(int pairs, int kv_heads, int tiles, int rows, int dim) {
  const int each = split_tiles(tiles, least_split_tiles(rows), most_splits(kv_heads));
  if (!adds_splits(dim, kernel_rows(rows)) || each * kTileKeys >= 200 * rows) return 0;
  const int groups = std::max(1, ceil_div(tiles, kGroupSplits * each));
  return std::max(0, pairs - ceil_div(kSlots, groups));
}

// A work item's place.
struct ItemPlace {
  int pair;    // request * kv_heads + KV head
  int item;    // of the pair
  int splits;  // of the item
};

BLASST_HOST_DEVICE ItemPlace place_of(int index, int grouped_pairs, int group_slots,
                                      int split_slots) {
  const int grouped = grouped_pairs * group_slots;
  if (index < grouped) return {index / group_slots, index % group_slots, kGroupSplits};
  const int rest = index - grouped;
  return {grouped_pairs + rest / split_slots, rest % split_slots, 1};
}

// The index of a pair's first item.
BLASST_HOST_DEVICE int first_item(int pair, int grouped_pairs, int group_slots, int split_slots) {
  if (pair < grouped_pairs) return pair * group_slots;
  return grouped_pairs * group_slots + (pair - grouped_pairs) * split_slots;
}

// Items that a block takes at a time: few enough for blocks to end together, many enough to pass
// over items that short requests do not have.
inline int chunk_items(int items, int blocks) { return std::clamp(items / (64 * blocks), 1, 32); }

}  // namespace blasst::cuda::decode
