// How decode is cut into splits and work items: no GPU needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>

#include "cuda/core/decode/splits.h"
#include "cuda/core/tensor.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/decode/latent/shape.h"

namespace blasst::cuda::decode {
namespace {

int splits_of(int tiles, int rows, int kv_heads) {
  return ceil_div(tiles, split_tiles(tiles, least_split_tiles(rows), most_splits(kv_heads)));
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
        EXPECT_LE(ceil_div(tiles, each), most);
        EXPECT_LE(ceil_div(tiles, each), split_slots(tiles * kTileKeys, least, most));
        EXPECT_LE(ceil_div(tiles, each), split_slots(6000 * kTileKeys, least, most));
      }
    }
  }
}

TEST(DecodeSchedule, LargeBatchesWorkOnWholeGroupsWhereResultsAreLarge) {
  EXPECT_FALSE(whole_groups(1, 4, 256, 16, 128));   // one request
  EXPECT_TRUE(whole_groups(64, 4, 256, 16, 128));   // 16 rows for every 512 keys
  EXPECT_FALSE(whole_groups(16, 8, 256, 4, 128));   // 4 rows for as many
  EXPECT_FALSE(whole_groups(64, 4, 256, 64, 128));  // no registers for it
  EXPECT_FALSE(whole_groups(64, 4, 256, 32, 256));
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
  EXPECT_EQ(run(512, 65, 8, 264, 64), 8);
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
