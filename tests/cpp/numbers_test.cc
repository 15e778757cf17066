// The tests' own inputs: are they what the tests take them for?
#include "testing/numbers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "testing/problem.h"
#include "testing/reference/reference.h"

namespace blasst::check {
namespace {

double skipped(const Case& c, TileShape shape) {
  Problem problem(c);
  const auto result = refer(problem.params, c.decode, shape);
  double count = 0;
  for (const auto& tile : result.tiles) count += !tile.kept;
  return count / static_cast<double>(result.tiles.size());
}

TEST(Numbers, NormalNumbersHaveMeanZeroAndVarianceOne) {
  double sum = 0, squares = 0;
  std::vector<float> row(128);
  for (int i = 0; i < 200; ++i) {
    Numbers{.seed = 5}.value(0, i, 0, row);
    for (const float x : row) sum += x, squares += x * x;
  }
  EXPECT_NEAR(sum / (200 * 128), 0, 0.02);
  EXPECT_NEAR(squares / (200 * 128), 1, 0.03);
}

TEST(Numbers, PlantedSparsityIsWhatWasAskedFor) {
  Case c{.requests = {{1024, 1024}}, .head_dim = 16, .value_dim = 16, .inputs = Inputs::kPlanted};
  c.causal = true;
  c.test = BLASST_TEST_RELATIVE;
  c.threshold = 1e-3f;
  const TileShape shape = prefill_plan(Problem(c).params).shape;
  const int64_t blocks = 1024 / shape.keys;  // with square tiles
  for (const double sparsity : {0.0, 0.5, 0.75}) {
    c.density = planted_density(sparsity, blocks * (blocks + 1) / 2, blocks);
    EXPECT_NEAR(skipped(c, shape), sparsity, sparsity == 0 ? 0 : 0.04);
  }
}

TEST(Numbers, DriftGivesGapsOfEverySize) {
  Case c{.requests = {{128, 1024}}};
  const auto tiles = refer(Problem(c).params, false, {64, 64, 0}).tiles;
  int small = 0, large = 0;
  for (const auto& tile : tiles) {
    small += tile.gap < -0.5 && tile.gap > -3;
    large += tile.gap < -3;
  }
  EXPECT_GT(small, 2);
  EXPECT_GT(large, 2);
}

TEST(Numbers, CasesOfASeedAreTheSame) {
  for (uint64_t seed = 0; seed < 50; ++seed)
    EXPECT_EQ(describe(random_case(seed)), describe(random_case(seed)));
}

}  // namespace
}  // namespace blasst::check
