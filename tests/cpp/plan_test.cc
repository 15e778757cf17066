// The CPU backend's host-side choices.
#include "cpu/plan.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "testing/problem.h"

namespace blasst::cpu {
namespace {

TEST(Plan, DecodeUnitsTakeManyHeadsIfEveryThreadStillHasWork) {
  EXPECT_EQ(decode_unit_heads(8, 16, 2), 8) << "16 units for 2 threads";
  EXPECT_EQ(decode_unit_heads(8, 1, 2), 1) << "one short request: its 8 heads are the only work";
  EXPECT_EQ(decode_unit_heads(8, 4, 2), 4);
  EXPECT_EQ(decode_unit_heads(1, 1, 64), 1);
  EXPECT_EQ(decode_unit_heads(64, 1000, 2), kUnitHeads);
}

TEST(Plan, DecodeUnitsCoverEveryTileOfEveryVisitOnce) {
  for (const int threads : {1, 2, 16}) {
    const check::Problem problem(
        {.decode = true,
         .requests = {{1, 10000}, {1, 0}, {1, 4 * kKeys * kSplitTiles}, {1, 1}, {1, kKeys * 196}},
         .heads = 6,
         .kv_heads = 3,
         .head_dim = 16,
         .value_dim = 16});
    const Problem p = problem::make_problem(problem.params, problem::Phase::kDecode);
    const std::vector<QueryTile> tiles = p.query_tiles(kQueryRows);
    const std::vector<DecodeUnit> units = decode_units(p, tiles, threads);
    std::set<int64_t> partials;
    std::vector<int64_t> visited(tiles.size());
    for (const DecodeUnit& unit : units) {
      EXPECT_LE(unit.visit.size(), kSplitTiles + BLASST_SEED_TILES);
      EXPECT_LT(unit.split, unit.splits);
      for (size_t t = 0; t < unit.tiles.size(); ++t) {
        EXPECT_TRUE(partials.insert(unit.first_partial(t) + unit.split).second)
            << "one writer each";
        visited[&unit.tiles[t] - tiles.data()] += unit.visit.size();
      }
    }
    EXPECT_EQ(std::ssize(partials), decode_partials(units));
    EXPECT_EQ(*partials.rbegin() + 1, decode_partials(units)) << "no gaps";
    for (size_t i = 0; i < tiles.size(); ++i)
      EXPECT_EQ(visited[i], problem::ceil_div(p.requests[tiles[i].request].keys, kKeys));
  }
}

TEST(Plan, FourTilesThatAreLeftOfAVisitJoinTheLastSplit) {
  const auto splits = [](int64_t tiles) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < count_splits(tiles); ++i)
      sizes.push_back(split_positions(tiles, i).size());
    return sizes;
  };
  using Sizes = std::vector<int64_t>;
  EXPECT_EQ(splits(0), Sizes{});
  EXPECT_EQ(splits(1), Sizes{1});
  EXPECT_EQ(splits(68), Sizes{68});
  EXPECT_EQ(splits(69), (Sizes{64, 5}));
  EXPECT_EQ(splits(128), (Sizes{64, 64}));
  EXPECT_EQ(splits(132), (Sizes{64, 68}));
  EXPECT_EQ(splits(133), (Sizes{64, 64, 5}));
}

TEST(Plan, TheTileOfAnEmptyBatchIsThatOfAnyOther) {
  for (const int64_t batch : {0, 1, 3}) {
    const AttentionParams p{.problem = {.batch = batch,
                                        .heads = 8,
                                        .kv_heads = 2,
                                        .head_dim = 64,
                                        .value_dim = 64,
                                        .query_length = 3}};
    EXPECT_EQ(decode_plan(p).shape.query_rows, 12) << batch;
  }
}

// What was checked is what is used: the caller's index arrays may change, or go, meanwhile.
TEST(Plan, IndexArraysAreReadOnce) {
  for (const check::Layout layout : {check::Layout::kPaged, check::Layout::kRagged}) {
    check::Problem problem({.requests = {{20, 70}, {30, 40}},
                            .head_dim = 16,
                            .value_dim = 16,
                            .layout = layout,
                            .ragged_queries = true});
    const check::Access access(problem.params);
    std::vector<const std::byte*> wanted;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t t = 0; t < access.requests()[b].keys; ++t) wanted.push_back(access.key(b, t, 0));
      for (int64_t t = 0; t < access.requests()[b].rows; ++t)
        wanted.push_back(access.query(b, t, 0));
    }
    const Problem p = problem::make_problem(problem.params, problem::Phase::kPrefill);
    const int64_t tokens = p.key_tensor().tokens;
    for (auto* array :
         {&problem.page_table, &problem.lengths, &problem.cu_keys, &problem.cu_queries})
      std::ranges::fill(*array, 1 << 30);
    std::vector<const std::byte*> found;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t t = 0; t < p.requests[b].keys; ++t) found.push_back(p.key(b, t, 0));
      for (int64_t t = 0; t < p.requests[b].rows; ++t) found.push_back(p.query(b, t, 0));
    }
    EXPECT_EQ(found, wanted);
    EXPECT_EQ(p.key_tensor().tokens, tokens);
  }
}

TEST(Plan, PrefillUnitsAreLongestFirst) {
  const check::Problem problem({.requests = {{1000, 1000}, {1000, 3000}}, .causal = true});
  const Problem p = problem::make_problem(problem.params, problem::Phase::kPrefill);
  const std::vector<QueryTile> tiles = p.query_tiles(kQueryRows);
  int64_t last = INT64_MAX, covered = 0;
  for (const PrefillUnit& unit : prefill_units(p, tiles)) {
    const int64_t work = unit.key_tiles.size() * std::ssize(unit.tiles);
    EXPECT_LE(work, last);
    last = work;
    covered += std::ssize(unit.tiles);
  }
  EXPECT_EQ(covered, std::ssize(tiles));
}

}  // namespace
}  // namespace blasst::cpu
