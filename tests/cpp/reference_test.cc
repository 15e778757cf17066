// The reference, against attention by its definition and against decisions worked out by hand.
#include "testing/reference/reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "testing/element.h"
#include "testing/problem.h"

namespace blasst::check {
namespace {

std::vector<double> load_row(DType dtype, const std::byte* address, int64_t size) {
  std::vector<double> row;
  for (int64_t d = 0; d < size; ++d)
    row.push_back(load_element(dtype, address + d * element_bytes(dtype)));
  return row;
}

struct Textbook {
  std::vector<double> out;  // [rows, heads, value_dim]
  std::vector<double> lse;  // [heads, rows]
};

// softmax(scale q k^T) v over the keys that a row sees; no tiles.
Textbook textbook(const Problem& problem) {
  const AttentionParams& p = problem.params;
  const Access access(p);
  const double scale =
      p.problem.scale > 0 ? p.problem.scale : 1 / std::sqrt(static_cast<float>(p.problem.head_dim));
  Textbook result{std::vector<double>(access.rows() * p.problem.heads * p.problem.value_dim),
                  std::vector<double>(access.rows() * p.problem.heads, -kInf)};
  for (int64_t b = 0; b < p.problem.batch; ++b) {
    const auto& request = access.requests()[b];
    for (int64_t i = 0; i < request.rows; ++i) {
      for (int64_t h = 0; h < p.problem.heads; ++h) {
        const int64_t kv_head = h / (p.problem.heads / p.problem.kv_heads);
        const auto q = load_row(p.problem.q.dtype, access.query(b, i, h), p.problem.head_dim);
        double* out =
            &result.out[((request.first_row + i) * p.problem.heads + h) * p.problem.value_dim];
        double l = 0;
        for (int64_t j = 0; j < request.keys; ++j) {
          if (!access.sees(b, i, h, j)) continue;
          const KeysValues& kv = p.problem.kv;
          const auto k = load_row(kv.k.dtype, access.key(b, j, kv_head), p.problem.head_dim);
          const auto v = load_row(kv.v.dtype, access.value(b, j, kv_head), p.problem.value_dim);
          double score = 0;
          for (int64_t d = 0; d < p.problem.head_dim; ++d)
            score += scale * q[d] * access.key_scale(b, kv_head) * k[d];
          if (p.problem.softcap > 0)
            score = p.problem.softcap * std::tanh(score / p.problem.softcap);
          l += std::exp(score);
          for (int64_t d = 0; d < p.problem.value_dim; ++d)
            out[d] += std::exp(score) * access.value_scale(b, kv_head) * v[d];
        }
        if (p.problem.sinks) l += std::exp(static_cast<double>(p.problem.sinks[h]));
        if (l == 0) continue;
        for (int64_t d = 0; d < p.problem.value_dim; ++d) out[d] /= l;
        result.lse[h * access.rows() + request.first_row + i] = std::log(l);
      }
    }
  }
  return result;
}

TEST(Reference, DenseIsTheTextbookForEveryTileShapeAndOrder) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Case c = random_case(seed, 1'000'000);
    c.test = BLASST_TEST_NONE;
    c.scores = BLASST_SCORES_EXACT;
    c.blocks = false;
    const Problem problem(c);
    const Textbook wanted = textbook(problem);
    for (const TileShape shape : {TileShape{64, 64, 0}, TileShape{1, 16, 2}, TileShape{7, 5, 0}}) {
      const auto result = refer(problem.params, c.decode, shape);
      for (size_t i = 0; i < wanted.out.size(); ++i)
        ASSERT_NEAR(result.out[i], wanted.out[i], 1e-9) << "seed " << seed << ": " << describe(c);
      for (size_t i = 0; i < wanted.lse.size(); ++i) {
        if (wanted.lse[i] == -kInf) {
          ASSERT_EQ(result.lse[i], -kInf);
        } else {
          ASSERT_NEAR(result.lse[i], wanted.lse[i], 1e-9) << "seed " << seed << ": " << describe(c);
        }
        ASSERT_EQ(result.dropped_mass[i], 0);
        ASSERT_EQ(result.dropped_mass_bound[i], 0);
      }
    }
  }
}

// One head whose scores are given, [rows][keys]: k holds a key's score for each of up to 16 rows,
// and row i of q picks its own.
Problem with_scores(const std::vector<std::vector<float>>& scores, float threshold, Order order) {
  Case c{.requests = {{std::ssize(scores), std::ssize(scores[0])}},
         .heads = 1,
         .head_dim = 16,
         .value_dim = 16,
         .scale = 1,
         .order = order,
         .test = BLASST_TEST_RELATIVE,
         .threshold = threshold};
  Problem problem(c);
  const Access access(problem.params);
  for (int64_t i = 0; i < std::ssize(scores); ++i) {
    for (int64_t d = 0; d < 16; ++d)
      store_element(c.dtype, access.query(0, i, 0) + 4 * d, d == i ? 1.0f : 0.0f);
    for (int64_t j = 0; j < std::ssize(scores[i]); ++j)
      store_element(c.dtype, access.key(0, j, 0) + 4 * i, scores[i][j]);
  }
  return problem;
}

std::vector<int64_t> kept_tiles(const reference::Result& result) {
  std::vector<int64_t> kept;
  for (const auto& tile : result.tiles)
    if (tile.kept) kept.push_back(tile.key_tile);
  return kept;
}

using Tiles = std::vector<int64_t>;
const std::vector<float> kScores = {0, 1.1f, -2, -0.5f, 3, 0.9f};
const float kE2 = std::exp(-2.0f);  // a tile is dropped when it is 2 below the running maximum

TEST(Reference, DecisionsByHand) {
  const TileShape one_key{1, 1, 0};
  const auto kept = [&](Order order, TileShape shape) {
    return kept_tiles(refer(with_scores({kScores}, kE2, order).params, false, shape));
  };
  // 0 is first; 1.1 above; -2 is 3.1 below; -0.5 is 1.6 below; 3 above; 0.9 is 2.1 below.
  EXPECT_EQ(kept(BLASST_FORWARD, one_key), (Tiles{0, 1, 3, 4}));
  // 0.9 is first; 3 above; the others 3.5, 5, 1.9 and 3 below.
  EXPECT_EQ(kept(BLASST_REVERSE, one_key), (Tiles{5, 4, 1}));
  EXPECT_EQ(kept(BLASST_SINK_FIRST, one_key), (Tiles{0, 5, 4, 1}));
  // Pairs (0, 1.1), (-2, -0.5), (3, 0.9).
  EXPECT_EQ(kept(BLASST_FORWARD, {1, 2, 0}), (Tiles{0, 1, 2}));
  EXPECT_EQ(kept(BLASST_REVERSE, {1, 2, 0}), (Tiles{2, 0}));
}

TEST(Reference, GapAndMarginByHand) {
  const auto tiles =
      refer(with_scores({kScores}, kE2, BLASST_FORWARD).params, false, {1, 1, 0}).tiles;
  EXPECT_EQ(tiles[0].gap, kInf);
  EXPECT_NEAR(tiles[2].gap, -3.1, 1e-6);
  EXPECT_NEAR(tiles[2].margin, -1.1, 1e-6);
  EXPECT_NEAR(tiles[2].maximum, -2, 1e-6);
  EXPECT_NEAR(tiles[5].gap, -2.1, 1e-6);
}

TEST(Reference, OneRowOfTheTileKeepsIt) {
  const std::vector<float> flat(kScores.size(), 0);  // never 2 below
  EXPECT_EQ(
      kept_tiles(refer(with_scores({kScores, flat}, kE2, BLASST_FORWARD).params, false, {2, 1, 0})),
      (Tiles{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(kept_tiles(refer(with_scores({kScores, kScores}, kE2, BLASST_FORWARD).params, false,
                             {2, 1, 0})),
            (Tiles{0, 1, 3, 4}));
}

TEST(Reference, ARowWithoutAValidKeyHasNoSay) {
  Problem problem = with_scores({kScores, kScores}, kE2, BLASST_FORWARD);
  problem.params.problem.mask.causal = 1;  // row 0 does not see the last key, whose gap is -2.1
  EXPECT_EQ(kept_tiles(refer(problem.params, false, {2, 1, 0})), (Tiles{0, 1, 3, 4}));
}

TEST(Reference, SplitsStartFromTheFirstTwoTiles) {
  Problem problem = with_scores({kScores}, kE2, BLASST_FORWARD);
  // Splits (0, 1.1), (-2, -0.5), (3, 0.9), each from the maximum 1.1.
  EXPECT_EQ(kept_tiles(refer(problem.params, true, {1, 1, 2})), (Tiles{0, 1, 3, 4}));
  // Splits of one: 0.9 is compared with 1.1, not with 3.
  EXPECT_EQ(kept_tiles(refer(problem.params, true, {1, 1, 1})), (Tiles{0, 1, 3, 4, 5}));
}

TEST(Reference, WhatIsLeftJoinsTheLastSplitIfItIsShort) {
  // The fifth is the best, and no seed: what is 4 below is kept in a split of its own alone.
  const auto kept = [&](int64_t behind, TileShape shape) {
    std::vector<float> scores = {0, 0, 0, 0, 5};
    scores.resize(scores.size() + behind, 1);
    const auto tiles =
        kept_tiles(refer(with_scores({scores}, kE2, BLASST_FORWARD).params, true, shape));
    return std::ssize(tiles) - 5;
  };
  EXPECT_EQ(kept(2, {1, 1, 5}), 0);
  EXPECT_EQ(kept(3, {1, 1, 5}), 3) << "more than half a split";
  EXPECT_EQ(kept(2, {1, 1, 4, 1}), 0) << "one split of seven";
  EXPECT_EQ(kept(3, {1, 1, 2, 2}), 0) << "two of four";
  EXPECT_EQ(kept(10, {1, 1, 11}), 0);
  EXPECT_EQ(kept(11, {1, 1, 11}), 5) << "more tiles than seeds";
}

TEST(Reference, AbsoluteTestComparesTheTileMaximum) {
  Problem problem = with_scores({kScores}, kE2, BLASST_FORWARD);
  const float tau = 1;
  problem.params.decision.test = {.kind = BLASST_TEST_ABSOLUTE, .values = &tau};
  EXPECT_EQ(kept_tiles(refer(problem.params, false, {1, 1, 0})), (Tiles{0, 1, 4}))
      << "0 is the first";
}

TEST(Reference, ScaleFactorIsDividedByTheKeyLength) {
  Problem problem = with_scores({kScores}, kE2, BLASST_FORWARD);
  const float factor = kE2 * static_cast<float>(kScores.size());
  problem.params.decision.test = {.kind = BLASST_TEST_SCALE_FACTOR, .values = &factor};
  EXPECT_EQ(kept_tiles(refer(problem.params, false, {1, 1, 0})), (Tiles{0, 1, 3, 4}));
}

TEST(Reference, SinksJoinTheDenominatorButNotTheDecision) {
  Problem problem = with_scores({kScores}, kE2, BLASST_FORWARD);
  const auto without = refer(problem.params, false, {1, 1, 0});
  const float sink = 6;
  problem.params.problem.sinks = &sink;
  const auto with = refer(problem.params, false, {1, 1, 0});
  EXPECT_EQ(kept_tiles(with), kept_tiles(without));
  EXPECT_NEAR(with.lse[0], std::log(std::exp(without.lse[0]) + std::exp(6.0)), 1e-12);
}

TEST(Reference, DroppedMassIsTheDenseProbabilityOfSkippedKeys) {
  const auto result = refer(with_scores({kScores}, kE2, BLASST_FORWARD).params, false, {1, 1, 0});
  double all = 0;
  for (const float s : kScores) all += std::exp(static_cast<double>(s));
  const double skipped = std::exp(-2.0) + std::exp(static_cast<double>(0.9f));
  EXPECT_NEAR(result.dropped_mass[0], skipped / all, 1e-12);
  EXPECT_NEAR(result.dropped_mass_bound[0], skipped / all, 1e-12) << "exact for tiles of one key";
}

TEST(Reference, TheBoundHoldsForMassAndError) {
  double largest = 0;
  for (uint64_t seed = 0; seed < 80; ++seed) {
    Case c = random_case(seed, 2'000'000);
    if (c.test == BLASST_TEST_NONE) c.test = BLASST_TEST_RELATIVE, c.threshold = 0.5f;
    Problem problem(c);
    const TileShape shape = plan(problem.params, c.decode).shape;
    const auto sparse = refer(problem.params, c.decode, shape);
    problem.params.decision.test = {};
    const auto dense = refer(problem.params, c.decode, shape);
    double value = 0;
    const Access access(problem.params);
    for (int64_t b = 0; b < problem.params.problem.batch; ++b)
      for (int64_t j = 0; j < access.requests()[b].keys; ++j)
        for (int64_t h = 0; h < c.kv_heads; ++h)
          for (const double x :
               load_row(problem.params.problem.kv.v.dtype, access.value(b, j, h), c.value_dim))
            value = std::max(value, access.value_scale(b, h) * std::abs(x));
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t row = 0; row < access.rows(); ++row) {
        const int64_t at = h * access.rows() + row;
        const double bound = sparse.dropped_mass_bound[at];
        largest = std::max(largest, sparse.dropped_mass[at]);
        ASSERT_LE(sparse.dropped_mass[at], bound + 1e-12) << "seed " << seed;
        // What softmax lost is what the log of its denominator lost.
        if (std::isfinite(dense.lse[at])) {
          ASSERT_NEAR(1 - std::exp(sparse.lse[at] - dense.lse[at]), sparse.dropped_mass[at], 1e-9);
        }
        for (int64_t d = 0; d < c.value_dim; ++d) {
          const int64_t element = (row * c.heads + h) * c.value_dim + d;
          ASSERT_LE(std::abs(sparse.out[element] - dense.out[element]), 2 * bound * value + 1e-12);
        }
      }
    }
  }
  EXPECT_GT(largest, 0.01) << "the cases above drop too little to test anything";
}

TEST(Reference, ForcedDecisionsReplaceTheTest) {
  const Problem problem = with_scores({kScores}, kE2, BLASST_FORWARD);
  const std::vector<bool> kept = {true, false, false, true, false, false};
  const auto result = refer(problem.params, false, {1, 1, 0}, &kept);
  EXPECT_EQ(kept_tiles(result), (Tiles{0, 3}));
  EXPECT_NEAR(result.lse[0], std::log(1 + std::exp(-0.5)), 1e-12);
  EXPECT_NEAR(result.tiles[4].gap, 3, 1e-6) << "the running maximum stayed at 0";
}

}  // namespace
}  // namespace blasst::check
