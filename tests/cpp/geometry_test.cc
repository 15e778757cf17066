// Sizes of arrays of tiles from a problem's scalars, against the tiles that requests have.
#include "problem/geometry.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "problem/problem.h"
#include "testing/problem.h"

namespace blasst::check {
namespace {

TEST(Geometry, OfALayout) {
  blasst_problem p{.batch = 3, .heads = 8, .kv_heads = 2, .query_length = 130};
  p.kv.key_length = 5000;
  const TileShape shape{.query_rows = 64, .keys = 128};
  problem::Geometry g = problem::geometry(p, problem::Phase::kPrefill, shape);
  EXPECT_EQ(g.tile_heads, 8);
  EXPECT_EQ(g.query_tiles, 9);
  EXPECT_EQ(g.key_tiles, 40);
  EXPECT_EQ(g.tile_words, 2);
  // Four query heads a KV head: their 520 rows decide together, or as many heads as the tile holds.
  for (const auto& [rows, tile_heads] :
       {std::pair<int64_t, int64_t>{520, 2}, {519, 4}, {260, 4}, {259, 8}, {64, 8}}) {
    g = problem::geometry(p, problem::Phase::kDecode, {.query_rows = rows, .keys = 128});
    EXPECT_EQ(g.tile_heads, tile_heads) << rows;
    EXPECT_EQ(g.query_tiles, 3);
  }

  p.query_layout = p.kv.layout = BLASST_LAYOUT_RAGGED;
  p.rows = 130, p.query_length = 0, p.kv.tokens = 300, p.kv.key_length = 0;
  g = problem::geometry(p, problem::Phase::kPrefill, shape);
  EXPECT_EQ(g.query_tiles, 4) << "127, 2 and 1 rows: 2 + 1 + 1";
  EXPECT_EQ(g.key_tiles, 3) << "one request may have all";
  p.batch = 1;
  EXPECT_EQ(problem::geometry(p, problem::Phase::kPrefill, shape).query_tiles, 3);
  p.batch = 3, p.rows = 2;
  EXPECT_EQ(problem::geometry(p, problem::Phase::kPrefill, shape).query_tiles, 2);

  p.kv.layout = BLASST_LAYOUT_PAGED;
  p.kv.tokens = 0, p.kv.page_size = 16, p.kv.page_table_stride = 9;
  EXPECT_EQ(problem::geometry(p, problem::Phase::kPrefill, shape).key_tiles, 2);
  p.kv.key_length = 128;
  EXPECT_EQ(problem::geometry(p, problem::Phase::kPrefill, shape).key_tiles, 1);
}

// No request's tile lies beyond the room, and two never share a place.
TEST(Geometry, HasRoomForEveryTile) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const Problem problem(random_case(seed, 1'000'000));
    const auto phase =
        problem.description.decode ? problem::Phase::kDecode : problem::Phase::kPrefill;
    const problem::Problem p = problem::make_problem(problem.params, phase);
    const Plan tiles = plan(problem.params, problem.description.decode);
    std::vector<int> used(tiles.tile_heads * tiles.query_tiles);
    for (const problem::QueryTile& tile : p.query_tiles(tiles.shape.query_rows)) {
      const int64_t head = problem.description.decode ? tile.head / p.group() : tile.head;
      ASSERT_LT(tile.index, tiles.query_tiles) << describe(problem.description);
      EXPECT_EQ(used[head * tiles.query_tiles + tile.index]++, 0);
      EXPECT_LE(p.requests[tile.request].keys, tiles.key_tiles * tiles.shape.keys);
    }
  }
}

// Before there are arrays or tensors: what the call will have.
TEST(Geometry, ThePlanReadsScalarsAlone) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const Problem problem(random_case(seed, 1'000'000));
    const Plan wanted = plan(problem.params, problem.description.decode);
    AttentionParams p = problem.params;
    p.report = {};
    p.decision.test.values = nullptr;
    blasst_problem& bare = p.problem;
    bare.query_lengths = bare.cu_seqlens_q = bare.kv.lengths = bare.kv.starts = nullptr;
    bare.kv.cu_seqlens = bare.kv.page_table = nullptr;
    bare.sinks = nullptr, bare.mask.bands = nullptr, bare.mask.blocks = nullptr;
    for (View* view : {&bare.q, &bare.kv.k, &bare.kv.v, &bare.out}) *view = {.dtype = view->dtype};
    const Plan got = plan(p, problem.description.decode);
    EXPECT_EQ(got.shape.query_rows, wanted.shape.query_rows);
    EXPECT_EQ(got.query_tiles, wanted.query_tiles) << describe(problem.description);
    EXPECT_EQ(got.key_tiles, wanted.key_tiles);
    EXPECT_EQ(got.tile_words, wanted.tile_words);
    EXPECT_EQ(got.workspace_bytes, wanted.workspace_bytes);
  }
}

}  // namespace
}  // namespace blasst::check
