// The integer functions that say which keys a row sees and which tiles are visited in which order.
#include "problem/tiles.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace blasst::problem {
namespace {

std::vector<int64_t> visit(Order order, Range tiles) {
  std::vector<int64_t> sequence;
  for (int64_t i = 0; i < tiles.size(); ++i) sequence.push_back(nth_tile(order, tiles, i));
  return sequence;
}

TEST(Tiles, Orders) {
  using Sequence = std::vector<int64_t>;
  EXPECT_EQ(visit(BLASST_FORWARD, {0, 4}), (Sequence{0, 1, 2, 3}));
  EXPECT_EQ(visit(BLASST_REVERSE, {0, 4}), (Sequence{3, 2, 1, 0}));
  EXPECT_EQ(visit(BLASST_SINK_FIRST, {0, 4}), (Sequence{0, 3, 2, 1}));
  EXPECT_EQ(visit(BLASST_SINK_FIRST, {2, 5}), (Sequence{4, 3, 2})) << "tile 0 is not visible";
  EXPECT_EQ(visit(BLASST_FORWARD, {2, 5}), (Sequence{2, 3, 4}));
  for (const Order order : {BLASST_FORWARD, BLASST_REVERSE, BLASST_SINK_FIRST}) {
    EXPECT_EQ(visit(order, {0, 1}), Sequence{0});
    EXPECT_EQ(visit(order, {}), Sequence{});
  }
}

// Against the header's sentence: query i stands at i + Lk - Lq and sees key j if the distance is
// allowed.
TEST(Tiles, VisibleKeysFollowTheDefinition) {
  const int64_t bands[][2] = {{0, 3}, {2, 9}, {-4, 1}};
  for (const int32_t causal : {0, 1}) {
    for (const int64_t left : {-1, 0, 3}) {
      for (const int64_t right : {-1, 0, 2}) {
        for (int band = -1; band < 3; ++band) {
          Mask mask;
          mask.causal = causal, mask.window_left = left, mask.window_right = right;
          const int64_t* distances = band < 0 ? nullptr : bands[band];
          for (int64_t position = -6; position < 12; ++position) {
            const Range range = visible_keys(allowed_distances(mask, distances), position, 8);
            for (int64_t key = 0; key < 8; ++key) {
              const int64_t distance = position - key;
              const bool sees =
                  (!causal || distance >= 0) && (left < 0 || distance <= left) &&
                  (right < 0 || -distance <= right) &&
                  (!distances || (distance >= distances[0] && distance <= distances[1]));
              EXPECT_EQ(key >= range.begin && key < range.end, sees)
                  << "causal " << causal << " window " << left << ", " << right << " band " << band
                  << " position " << position << " key " << key;
            }
          }
        }
      }
    }
  }
}

TEST(Tiles, RangeCoversTheRowsAndNoMore) {
  const std::vector<Range> rows = {{70, 71}, {}, {129, 200}};
  EXPECT_EQ(tile_range(rows, 64).begin, 1);
  EXPECT_EQ(tile_range(rows, 64).end, 4);
  EXPECT_TRUE(any_visible(rows, {64, 128}));
  EXPECT_FALSE(any_visible(rows, {71, 129})) << "a gap between the rows";
  EXPECT_TRUE(tile_range(std::vector<Range>{{}, {}}, 64).empty());
}

TEST(Tiles, GapBins) {
  const double width = BLASST_GAP_RANGE / (BLASST_GAP_BINS - 2);
  EXPECT_EQ(gap_bin(-INFINITY), 0);
  EXPECT_EQ(gap_bin(-BLASST_GAP_RANGE - width / 2), 0);
  EXPECT_EQ(gap_bin(-BLASST_GAP_RANGE + width / 2), 1);
  EXPECT_EQ(gap_bin(-width / 2), BLASST_GAP_BINS - 2);
  EXPECT_EQ(gap_bin(-1e-300), BLASST_GAP_BINS - 2);
  for (const double gap : {0.0, 5.0, double{INFINITY}, std::nan("")})
    EXPECT_EQ(gap_bin(gap), BLASST_GAP_BINS - 1) << gap;
}

}  // namespace
}  // namespace blasst::problem
