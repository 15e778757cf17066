// How decode is cut into splits and work items: no GPU needed.
#include <gtest/gtest.h>

#include <array>
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
  EXPECT_EQ(item_splits(1, 4, 256, 16, 128), 1);              // one request
  EXPECT_EQ(item_splits(64, 4, 256, 16, 128), kGroupSplits);  // 16 rows for every 512 keys
  EXPECT_EQ(item_splits(16, 8, 512, 4, 128), 1);              // 4 rows for every 1,024
  EXPECT_EQ(item_splits(64, 4, 256, 64, 128), 1);             // no registers for it
  EXPECT_EQ(item_splits(64, 4, 256, 32, 256), 1);
}

TEST(DecodeSchedule, RunsOfSplitsEndTogether) {
  EXPECT_EQ(splits_of_item(1, 8, 16, 132, 4), 1);    // one request: all blocks that there can be
  EXPECT_EQ(splits_of_item(128, 4, 64, 132, 4), 4);  // one round of whole requests
  EXPECT_EQ(splits_of_item(66, 4, 64, 132, 4), 2);   // of halves
  EXPECT_EQ(splits_of_item(1000, 1, 64, 132, 4), 1);
}

TEST(DecodeSchedule, ItemsHaveTheirPlace) {
  const int batch = 5, kv_heads = 3, slots = 7;
  for (int index = 0; index < batch * kv_heads * slots; ++index) {
    const ItemPlace place = place_of(index, slots, kv_heads);
    EXPECT_LT(place.request, batch);
    EXPECT_LT(place.kv_head, kv_heads);
    EXPECT_LT(place.item, slots);
    EXPECT_EQ(index_of(place, slots, kv_heads), index);
  }
  EXPECT_EQ(place_of(1, slots, kv_heads).kv_head, 1);
}

TEST(DecodeSchedule, ChunksAreSmall) {
  EXPECT_EQ(chunk_items(1, 1), 1);
  EXPECT_EQ(chunk_items(4096, 264), 1);
  EXPECT_EQ(chunk_items(1 << 20, 264), 32);
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
