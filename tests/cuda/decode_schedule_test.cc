// How decode is cut into splits and work items: no GPU needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>

#include "cuda/core/decode/splits.h"
#include "cuda/core/decode/steps.h"
#include "cuda/core/tensor.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/decode/latent/shape.h"

namespace blasst::cuda::decode {
namespace {

int splits_of(int tiles, int rows, int kv_heads) {
  return count_splits(tiles, split_tiles(tiles, least_split_tiles(rows), most_splits(kv_heads)));
}

TEST(DecodeSchedule, OneLongRequestFillsTheChip) {
  for (const int kv_heads : {1, 2, 4, 8, 16}) {
    const int items = kv_heads * splits_of(131072 / kTileKeys, 4, kv_heads);
    EXPECT_GE(items, kSlots * 9 / 10) << kv_heads;
    EXPECT_LE(items, kSlots + kv_heads) << kv_heads;
  }
}

TEST(DecodeSchedule, SplitsHaveTheLeastSizeAndFitTheirSlots) {
  for (const int kv_heads : {1, 3, 8, 64, 300}) {
    for (const int rows : {1, 16, 40, 64}) {
      const int least = least_split_tiles(rows), most = most_splits(kv_heads);
      for (int tiles = 1; tiles < 5000; tiles += 7) {
        const int each = split_tiles(tiles, least, most);
        EXPECT_GE(each, least);
        EXPECT_LE(count_splits(tiles, each), most);
        EXPECT_LE(count_splits(tiles, each), split_slots(tiles * kTileKeys, least, most));
        EXPECT_LE(count_splits(tiles, each), split_slots(6000 * kTileKeys, least, most));
      }
    }
  }
}

TEST(DecodeSchedule, FourTilesThatAreLeftJoinTheLastSplit) {
  const int wanted[] = {0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2};  // of 0 to 13 tiles
  for (int tiles = 0; tiles < 14; ++tiles) EXPECT_EQ(count_splits(tiles, 8), wanted[tiles]);
  EXPECT_EQ(count_splits(68, 8), 8);
  EXPECT_EQ(count_splits(69, 8), 9);
  EXPECT_EQ(count_splits(68, 64), 1);
  EXPECT_EQ(count_splits(69, 64), 2);
}

TEST(DecodeSchedule, LargeBatchesWorkOnWholeGroupsWhereResultsAreLarge) {
  EXPECT_FALSE(whole_groups(1, 4, 256, 16, 128));   // one request
  EXPECT_TRUE(whole_groups(64, 4, 256, 16, 128));   // 16 rows for every 512 keys
  EXPECT_FALSE(whole_groups(16, 8, 256, 4, 128));   // 4 rows for as many
  EXPECT_FALSE(whole_groups(64, 4, 256, 64, 128));  // no registers for it
  EXPECT_FALSE(whole_groups(64, 4, 256, 32, 256));
  EXPECT_FALSE(whole_groups(66, 4, 68, 16, 128));  // a group of each, an item a block
  EXPECT_TRUE(whole_groups(66, 4, 69, 16, 128));   // a ninth split
}

TEST(DecodeSchedule, RunsOfSplitsEndTogether) {
  const auto run = [](int pairs, int tiles, int split_tiles, int blocks, int most_tiles) {
    Plan plan{};
    plan.rows = 4, plan.folds = true, plan.blocks = blocks, plan.most_item_tiles = most_tiles;
    return splits_of_item(plan, pairs, tiles, split_tiles);
  };
  EXPECT_EQ(run(1, 128, 16, 132, 64), 1);     // one request: all blocks that there can be
  EXPECT_EQ(run(128, 256, 64, 132, 256), 4);  // one round of whole requests
  EXPECT_EQ(run(66, 256, 64, 132, 256), 2);   // of halves
  EXPECT_EQ(run(1000, 64, 64, 132, 256), 1);
  EXPECT_EQ(run(128, 256, 8, 264, 16), 2);   // no more than fit
  EXPECT_EQ(run(128, 256, 32, 264, 16), 1);  // one always
  EXPECT_EQ(run(128, 0, 8, 264, 16), 1);
  // A tile more or less changes little: two rounds of groups, and what is left beside them.
  for (const int tiles : {255, 256, 257, 260}) EXPECT_EQ(run(128, tiles, 8, 264, 64), 8);
  for (const int tiles : {64, 65, 68}) EXPECT_EQ(run(512, tiles, 8, 264, 64), 8);
  EXPECT_EQ(run(384, 94, 8, 264, 64), 6);    // halves, in three rounds
  EXPECT_EQ(run(64, 4096, 8, 264, 999), 8);  // a group at most
}

TEST(DecodeSchedule, QuotientsAreThoseOfIntegers) {
  constexpr int kMost = (1 << 21) - 1;
  std::mt19937 random(1);
  for (int i = 0; i < 200'000; ++i) {
    const int b = 1 + static_cast<int>(random() % (i % 2 ? kMost : 300));
    const int multiple = b * static_cast<int>(random() % (kMost / b + 1));
    for (const int a : {std::max(0, multiple - 1), multiple, std::min(kMost, multiple + b - 1)})
      ASSERT_EQ(quotient(a, inverse(b)), a / b) << a << " / " << b;
  }
}

TEST(DecodeSchedule, ItemsHoldEverySplitOfARequestOnce) {
  Plan plan{};
  plan.least_split_tiles = 8, plan.most_splits = 33;
  plan.blocks = 264, plan.most_item_tiles = 16;
  for (const bool groups : {false, true}) {
    plan.whole_groups = groups;
    for (const bool folds : {groups, true}) {
      plan.folds = folds;
      for (int tiles = 0; tiles < 2000; tiles += 3) {
        const Cut cut = cut_of(plan, 128, tiles);
        const int item_tiles = cut.item_splits * cut.split_tiles;
        EXPECT_LE((cut.items - 1) * item_tiles, tiles);  // the last split may be short
        EXPECT_LT(cut.splits - cut.items * cut.item_splits, cut.item_splits);
        // Whole results.
        EXPECT_TRUE(cut.item_splits % cut.result_splits == 0 || cut.item_splits >= cut.splits);
        EXPECT_TRUE(groups || cut.item_splits == 1 || item_tiles <= plan.most_item_tiles);
      }
    }
  }
  plan.whole_groups = false, plan.most_item_tiles = 64;
  EXPECT_EQ(cut_of(plan, 128, 256).results, 4);  // whole groups, if they come out so
  EXPECT_EQ(cut_of(plan, 8, 256).results, 32);   // of few requests, no
}

// The first tile of each split, by the words of blasst_tile_shape.
std::set<int> first_tiles(int tiles, int each) {
  std::set<int> first = {0};
  for (int tile = each; tile < tiles; tile += each)
    if (2 * (tiles - tile) > each || tiles - tile > BLASST_SEED_TILES) first.insert(tile);
  return first;
}

// The steps of all items of a request, as the kernels take them.
void expect_cut(const Plan& plan, int pairs, int tiles) {
  const Cut cut = cut_of(plan, pairs, tiles);
  const std::set<int> first = first_tiles(tiles, cut.split_tiles);
  std::set<int> slots;
  int next = 0;  // tile
  for (int split = 0; split < cut.splits; split += cut.item_splits) {
    const Range item = tiles_of_splits(split, cut.item_splits, tiles, cut.split_tiles);
    Steps steps(item.begin, item.end, cut.split_tiles);
    ASSERT_EQ(steps.count(), item.end - item.begin + (split > 0 ? BLASST_SEED_TILES : 0));
    int results = 0;
    for (int i = 0, of_result = 0; i < steps.count(); ++i) {
      const Step step = steps.next();
      ASSERT_EQ(step.flags & kFirstOfItem, i == 0 ? kFirstOfItem : 0);
      ASSERT_EQ(step.flags & kLastOfItem, i + 1 == steps.count() ? kLastOfItem : 0);
      ASSERT_EQ(step.flags & kSeed, step.position < BLASST_SEED_TILES ? kSeed : 0);
      if (split > 0 && i < BLASST_SEED_TILES) {
        ASSERT_EQ(step.position, i);
        ASSERT_EQ(step.flags & (kOnlySeed | kFirstOfSplit | kLastOfSplit), kOnlySeed);
        continue;
      }
      ASSERT_EQ(step.position, next++);
      ASSERT_EQ(step.flags & (kOnlySeed | kLastSeed), 0);
      ASSERT_EQ(step.flags & kFirstOfSplit, first.contains(step.position) ? kFirstOfSplit : 0);
      const bool ends = next == tiles || first.contains(next);
      ASSERT_EQ(step.flags & kLastOfSplit, ends ? kLastOfSplit : 0);
      if (ends && (++of_result == cut.result_splits || i + 1 == steps.count()))
        slots.insert(split / cut.result_splits + results++), of_result = 0;
    }
  }
  ASSERT_EQ(next, tiles);
  ASSERT_EQ(std::ssize(slots), cut.results);
  ASSERT_TRUE(slots.empty() || *slots.rbegin() + 1 == cut.results);
  ASSERT_LE(cut.results, plan.result_slots);
}

TEST(DecodeSchedule, StepsAreEveryTileOnceAndTheirResultsHaveSlots) {
  std::mt19937 random(1);
  const auto any = [&random](int least, int most) {
    return least + static_cast<int>(random() % (most - least + 1));
  };
  for (int i = 0; i < 20'000; ++i) {
    const int room = any(1, i % 10 ? 300 : 5000), batch = any(1, 200), kv_heads = any(1, 40);
    Plan plan{};
    plan.rows = any(1, kMaxRows);
    plan.least_split_tiles = any(kLeastSplitTiles, i % 2 ? 12 : 64);
    plan.most_splits = any(1, i % 3 ? kSlots : 9);
    plan.whole_groups = any(0, 1);
    plan.folds = plan.whole_groups || any(0, 1);
    plan.blocks = any(1, kSlots);
    plan.most_item_tiles = any(1, 8) * plan.least_split_tiles;
    plan.result_slots =
        ceil_div(split_slots(room * kTileKeys, plan.least_split_tiles, plan.most_splits),
                 plan.whole_groups ? kGroupSplits : 1);
    for (const int tiles : {any(0, room), room}) {
      expect_cut(plan, batch * kv_heads, tiles);
      if (HasFatalFailure()) FAIL() << tiles << " tiles, splits of " << plan.least_split_tiles;
    }
  }
}

TEST(DecodeSchedule, ManyRowsAreAddedByAWarpEach) {
  Plan plan{};
  plan.result_slots = 33;
  EXPECT_FALSE(adds_in_warp(plan, 32));
  EXPECT_EQ(combine_shared_bytes(plan, 32, 128), 5 * (128 + 4) * 4);
  EXPECT_EQ(combine_shared_bytes(plan, 32, 512), 5 * (256 + 4) * 4);  // in two slices
  plan.result_slots = most_splits(1);
  for (const int dim : {64, 96, 128, 192, 256, 512})
    EXPECT_LE(combine_shared_bytes(plan, 1, dim), kMostCombineBytes);
  EXPECT_TRUE(adds_in_warp(plan, 512));
  EXPECT_EQ(combine_shared_bytes(plan, 512, 128), 0);
  plan.result_slots = 8;
  EXPECT_TRUE(adds_in_warp(plan, 32));
}

TEST(DecodeSchedule, EveryResultHasAPlaceOfItsOwn) {
  const int batch = 5, kv_heads = 3;
  Plan plan{};
  plan.result_slots = 7;
  std::set<int> slots;
  for (int request = 0; request < batch; ++request)
    for (int head = 0; head < kv_heads; ++head)
      for (int result = 0; result < plan.result_slots; ++result)
        slots.insert(slot_of(plan, kv_heads, request, head, result));
  EXPECT_EQ(std::ssize(slots), batch * kv_heads * plan.result_slots);
  EXPECT_EQ(*slots.rbegin(), batch * kv_heads * plan.result_slots - 1);
}

TEST(DecodeSchedule, VisitIsWhatThePositionsSee) {
  const auto expect = [](Range range, int begin, int end) {
    EXPECT_EQ(range.begin, begin);
    EXPECT_EQ(range.end, end);
  };
  expect(visit(0, 1, {0, kUnlimited}), 0, 0);
  expect(visit(1, 1, {0, kUnlimited}), 0, 1);
  expect(visit(640, 1, {0, kUnlimited}), 0, 10);
  expect(visit(641, 1, {0, kUnlimited}), 0, 11);
  expect(visit(640, 1, {0, 63}), 9, 10);   // keys 576 to 639
  expect(visit(640, 1, {0, 64}), 8, 10);   // keys 575 to 639
  expect(visit(640, 16, {0, 63}), 8, 10);  // the first position stands at 624
  expect(visit(5, 16, {0, 63}), 0, 1);     // more positions than keys
  expect(visible_keys(640, 1, {0, 64}), 575, 640);
}

TEST(DecodeSchedule, EveryOrderVisitsEveryTileOnce) {
  for (const Range tiles : {Range{0, 9}, Range{3, 9}, Range{0, 1}}) {
    for (const int order : {0, 1, 2}) {
      std::set<int> seen;
      for (int i = 0; i < tiles.end - tiles.begin; ++i) seen.insert(tile_at(order, tiles, i));
      EXPECT_EQ(std::ssize(seen), tiles.end - tiles.begin);
      EXPECT_EQ(*seen.begin(), tiles.begin);
      EXPECT_EQ(*seen.rbegin(), tiles.end - 1);
    }
  }
  EXPECT_EQ(tile_at(2, {0, 9}, 0), 0);
  EXPECT_EQ(tile_at(2, {0, 9}, 1), 8);
  EXPECT_EQ(tile_at(2, {3, 9}, 0), 8);
}

}  // namespace
}  // namespace blasst::cuda::decode
