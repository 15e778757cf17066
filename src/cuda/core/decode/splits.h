// How the keys of a request are cut into splits and splits into work. Plain functions, the same on
// the host and in the kernels.
//
// The splits of a request depend on its own length and on the shapes of one request alone, so its
// result has the same bits alone and in any batch. Splits form groups; the results of a group's
// splits are added in order, then the groups'. A result is of one split or of one whole group, and
// a work item makes one result or several, which is a matter of speed: the additions are the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/core/decode/params.h"
#include "cuda/core/host_device.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::decode {

inline constexpr int kSlots = 264;      // what one request is spread over: two blocks on 132 SMs
inline constexpr int kGroupSplits = 8;  // splits whose results are added before all else
inline constexpr int kLeastSplitTiles = 8;
static_assert(kLeastSplitTiles >= BLASST_SEED_TILES, "no split starts among the seeds");

// A split is at least this many tiles: its result, `rows` rows in float32, stays small against its
// keys and values.
BLASST_HOST_DEVICE int least_split_tiles(int rows) {
  return rows > 2 * kLeastSplitTiles ? rows / 2 : kLeastSplitTiles;
}

// A request has at most this many splits for each of its KV heads.
BLASST_HOST_DEVICE int most_splits(int kv_heads) { return ceil_div(kSlots, kv_heads); }

// Tiles a split, for a visit of `tiles` tiles; the last has fewer, or more.
BLASST_HOST_DEVICE int split_tiles(int tiles, int least_tiles, int most_splits) {
  const int even = ceil_div(tiles, most_splits);
  return even > least_tiles ? even : least_tiles;
}

// What is left of a visit joins the split before it if it is so many tiles at most: by itself it
// would look at as many seeds. Of more, a request alone would wait for the longer split.
inline constexpr int kMostJoining = BLASST_SEED_TILES;
static_assert(2 * kMostJoining <= kLeastSplitTiles, "half a split at most");

// Where a split of a visit of `tiles` tiles ends that has all its tiles at `end`.
BLASST_HOST_DEVICE int split_end(int end, int tiles) {
  return tiles - end <= kMostJoining ? tiles : end;
}

BLASST_HOST_DEVICE int count_splits(int tiles, int split_tiles) {
  return tiles <= split_tiles ? tiles > 0 : ceil_div(tiles - kMostJoining, split_tiles);
}

// Keys that some of the request's last `positions` positions sees, one at least.
BLASST_HOST_DEVICE Range visible_keys(int keys, int positions, Distances distances) {
  return keys_seen(keys - positions, keys - 1, distances, keys);
}

BLASST_HOST_DEVICE Range visit(int keys, int positions, Distances distances) {
  const Range seen = visible_keys(keys, positions, distances);
  if (positions == 0 || seen.begin >= seen.end) return {0, 0};
  return {seen.begin / kTileKeys, ceil_div(seen.end, kTileKeys)};
}

// The most splits of a request of at most `keys` keys.
inline int split_slots(int keys, int least_tiles, int most_splits) {
  return std::max(1, std::min(most_splits, count_splits(ceil_div(keys, kTileKeys), least_tiles)));
}

// Query rows of the kernel that takes `rows`.
BLASST_HOST_DEVICE constexpr int kernel_rows(int rows) {
  return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
}

// Whether the kernel has registers for the result of a group beside that of a split.
BLASST_HOST_DEVICE constexpr bool adds_splits(int dim, int kernel_rows) {
  return kernel_rows <= 32 && dim * kernel_rows <= 128 * 32;
}

// Whether all work items are whole groups: where results of single splits would be more than a
// fiftieth of the keys and values that they come from, once that leaves an item for every block.
inline bool whole_groups(int batch, int kv_heads, int tiles, int rows, int dim) {
  const int each = split_tiles(tiles, least_split_tiles(rows), most_splits(kv_heads));
  if (!adds_splits(dim, kernel_rows(rows)) || each * kTileKeys >= 100 * rows) return false;
  const int groups = ceil_div(count_splits(tiles, each), kGroupSplits);
  return int64_t{batch} * kv_heads * groups > kSlots;
}

// Whether an item's splits are added by the kernel, group by group: where it begins with a group.
BLASST_HOST_DEVICE bool adds_groups(const Plan& plan, int item_splits, int splits) {
  return plan.folds && (item_splits % kGroupSplits == 0 || item_splits >= splits);
}

// a / b for 0 <= a < 2^21 and 0 < b (beyond, it may be one off), the same bits on the host and in
// every kernel. A block's first copy waits for a dozen of them, and integers divide slowly.
BLASST_HOST_DEVICE int quotient(int a, float inverse_of_b) {
#if defined(__CUDA_ARCH__)
  return __float2int_rz(__fmul_rn(__fadd_rn(__int2float_rn(a), 0.5f), inverse_of_b));
#else
  return static_cast<int>((static_cast<float>(a) + 0.5f) * inverse_of_b);
#endif
}
BLASST_HOST_DEVICE float inverse(int b) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(__int2float_rn(b));
#else
  return 1.0f / static_cast<float>(b);
#endif
}

// Splits that a block takes one after the other, after one look at the seeds: of at most
// plan.most_item_tiles tiles in all, not counting those that join the last split, what lets all
// blocks end soonest, as if all requests were as long. pairs: requests times KV heads; tiles: that
// each of them visits.
BLASST_HOST_DEVICE int splits_of_item(const Plan& plan, int pairs, int tiles, int split_tiles) {
  const int splits = count_splits(tiles, split_tiles);
  // In eighths of what a tile takes, as measured. A seed's tile is scored, and no more: half of it.
  // To begin and to end takes about one, and each row of a result an eighth.
  const auto cost = [&plan](int item_tiles, int item_splits, bool adds) {
    const int results = adds ? ceil_div(item_splits, kGroupSplits) : item_splits;
    return 8 * (item_tiles + BLASST_SEED_TILES / 2 + 1) + results * plan.rows;
  };
  const int whole_splits = quotient(tiles, inverse(split_tiles));
  const float of_blocks = inverse(plan.blocks);
  const auto rounds_of = [&](int items) { return quotient(items + plan.blocks - 1, of_blocks); };
  int best = 1;
  int64_t least = INT64_MAX;
  // Unrolled: no candidate waits for another, and all divide by constants.
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int run = 1; run <= kGroupSplits; ++run) {
    if (run > 1 && (run > splits || run * split_tiles > plan.most_item_tiles)) break;
    const bool all = run >= splits;  // of a request and KV head
    const int of_each = all ? 1 : whole_splits / run;
    const int size = all ? tiles : run * split_tiles, rest = tiles - of_each * size;
    const int whole = pairs * of_each, rounds = rounds_of(whole);
    const bool adds = adds_groups(plan, run, splits);
    const int each = cost(size, run, adds);
    int64_t time = int64_t{rounds} * each;
    const int rest_splits = splits - of_each * run;
    if (rest_splits > 0) {
      // Behind the last whole items, and where that round has blocks left.
      const int last = cost(rest, rest_splits, adds);
      const int beside = (rounds * plan.blocks - whole) * quotient(each, inverse(last));
      if (pairs > beside) time += int64_t{rounds_of(pairs - beside)} * last;
    } else {
      time += int64_t{rounds_of(pairs)} * 8 * rest;  // joins the last of each
    }
    if (time < least) least = time, best = run;
  }
  return best;
}

// How the work on a KV head of a request of so many tiles is cut. pairs: of the launch.
struct Cut {
  int split_tiles, splits;
  int item_splits;             // of a whole work item
  int items;                   // whole ones, of the request and KV head; one more for what is left
  int result_splits, results;  // the same of results: one of a split, or of a group
};
BLASST_HOST_DEVICE Cut cut_of(const Plan& plan, int pairs, int tiles) {
  Cut cut{};
  cut.split_tiles = split_tiles(tiles, plan.least_split_tiles, plan.most_splits);
  cut.splits = count_splits(tiles, cut.split_tiles);
  cut.item_splits =
      plan.whole_groups ? kGroupSplits : splits_of_item(plan, pairs, tiles, cut.split_tiles);
  cut.items = cut.splits / cut.item_splits;
  cut.result_splits = adds_groups(plan, cut.item_splits, cut.splits) ? kGroupSplits : 1;
  cut.results = ceil_div(cut.splits, cut.result_splits);
  return cut;
}

// Positions in a visit of `tiles` tiles of `splits` splits from the first on, fewer where it ends.
BLASST_HOST_DEVICE Range tiles_of_splits(int first, int splits, int tiles, int split_tiles) {
  const int begin = first * split_tiles;
  return {begin, split_end(begin + splits * split_tiles, tiles)};
}

// Where a result lies; those of a KV head are kv_heads apart.
BLASST_HOST_DEVICE int slot_of(const Plan& plan, int kv_heads, int request, int kv_head,
                               int result) {
  return (request * plan.result_slots + result) * kv_heads + kv_head;
}

// The combining kernel takes a row of many elements as so many rows.
BLASST_HOST_DEVICE constexpr int combine_slices(int value_dim) {
  return value_dim > 256 ? value_dim / 256 : 1;
}

// Whether the combining kernel adds the results of each of `rows` rows in one warp: where there are
// many, or they have few results.
BLASST_HOST_DEVICE bool adds_in_warp(const Plan& plan, int rows) {
  return rows > kSlots || plan.whole_groups || plan.result_slots <= kGroupSplits;
}

inline constexpr int kGroupFloats = 4;  // two sums and two maxima, beside an output
inline constexpr int kMostCombineBytes =
    (kSlots + kGroupSplits - 1) / kGroupSplits * (256 + kGroupFloats) * 4;

// Of shared memory, for the sums of each group: no more than is used, so that its blocks may stand
// ready beside those of the attention kernel.
inline int combine_shared_bytes(const Plan& plan, int rows, int value_dim) {
  if (adds_in_warp(plan, rows)) return 0;
  const int floats = value_dim / combine_slices(value_dim) + kGroupFloats;
  return ceil_div(plan.result_slots, kGroupSplits) * floats * static_cast<int>(sizeof(float));
}

// Warps of a block of the combining kernel: many for one row, or little for many.
inline int combine_warps(int64_t rows) { return rows <= kSlots ? 8 : 4; }

}  // namespace blasst::cuda::decode
