// NaN and infinity in Q, K and V: whom they reach, and whom they must not.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "promises.h"
#include "testing/compare.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

// One request: problems in which every row and tile is easy to name.
Case case_of(DType dtype, bool decode) {
  Case c{.seed = 11,
         .decode = decode,
         .dtype = dtype,
         .requests = {{150, 300}},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 32,
         .value_dim = 32,
         .inputs = Inputs::kGaussian,
         .causal = true};
  if (decode) c.requests = {{6, 9000}};
  return c;
}

class SpecialValues : public OnEveryIsa {
 protected:
  static void for_each_case(const std::function<void(Case)>& body) {
    for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16})
      for (const bool decode : {false, true}) body(case_of(dtype, decode));
  }

  static void set(const Problem& p, std::byte* row, int64_t element, float value) {
    store_element(p.params.problem.q.dtype, row + element * element_bytes(p.params.problem.q.dtype),
                  value);
  }

  // Output rows before and after a change: those in `reached` are NaN throughout the elements
  // given, all others have the same bits.
  static void expect_reach(const Case& c, const std::function<void(Problem&)>& change,
                           const std::function<bool(int64_t row, int64_t head)>& reached,
                           int64_t only_element = -1) {
    Problem problem(c);
    problem.run();
    const std::vector<float> before = problem.out();
    change(problem);
    problem.run();
    const std::vector<float> after = problem.out();
    for (int64_t row = 0; row < c.requests[0].queries; ++row) {
      for (int64_t h = 0; h < c.heads; ++h) {
        for (int64_t d = 0; d < c.value_dim; ++d) {
          const size_t at = (row * c.heads + h) * c.value_dim + d;
          if (!reached(row, h) || (only_element >= 0 && d != only_element)) {
            ASSERT_EQ(after[at], before[at])
                << "row " << row << " head " << h << ": " << describe(c);
          } else {
            ASSERT_TRUE(std::isnan(after[at]))
                << "row " << row << " head " << h << ": " << describe(c);
          }
        }
      }
    }
    EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
  }
};

TEST_P(SpecialValues, ANanQueryReachesItsRowOnly) {
  for_each_case([](const Case& c) {
    expect_reach(
        c, [](Problem& p) { set(p, Access(p.params).query(0, 2, 1), 5, kNan); },
        [](int64_t row, int64_t head) { return row == 2 && head == 1; });
  });
}

TEST_P(SpecialValues, ANanKeyReachesTheRowsThatSeeIt) {
  for_each_case([](const Case& c) {
    const int64_t key = c.requests[0].keys - 3;
    Problem problem(c);
    const Access access(problem.params);
    expect_reach(
        c, [&](Problem& p) { set(p, Access(p.params).key(0, key, 1), 5, kNan); },
        [&](int64_t row, int64_t head) { return head >= 2 && access.sees(0, row, head, key); });
  });
}

TEST_P(SpecialValues, ANanValueReachesTheRowsThatSeeIt) {
  for (const float value : {kNan, kInf, -kInf}) {
    for_each_case([&](const Case& c) {
      const int64_t key = c.requests[0].keys - 3;
      Problem problem(c);
      problem.run();
      const std::vector<float> before = problem.out();
      const Access access(problem.params);
      set(problem, access.value(0, key, 1), 5, value);
      problem.run();
      const std::vector<float> after = problem.out();
      for (int64_t row = 0; row < c.requests[0].queries; ++row) {
        for (int64_t h = 0; h < c.heads; ++h) {
          for (int64_t d = 0; d < c.value_dim; ++d) {
            const size_t at = (row * c.heads + h) * c.value_dim + d;
            if (h >= 2 && d == 5 && access.sees(0, row, h, key)) {
              ASSERT_FALSE(std::isfinite(after[at])) << describe(c);
            } else {
              ASSERT_EQ(after[at], before[at])
                  << "row " << row << " head " << h << ": " << describe(c);
            }
          }
        }
      }
    });
  }
}

TEST_P(SpecialValues, ASkippedTileIsNotReadByAnyRow) {
  for_each_case([](Case c) {
    c.inputs = Inputs::kPlanted;
    c.test = BLASST_TEST_RELATIVE;
    c.threshold = 1e-3f;
    Problem problem(c);
    problem.run();
    const std::vector<std::byte> before = problem.out_bits();
    // Spoil V wherever no query tile of the KV head kept the key tile.
    const TileShape shape = plan(problem.params, c.decode).shape;
    const auto tiles = refer(problem.params, c.decode, shape).tiles;
    const Access access(problem.params);
    int spoiled = 0;
    for (int64_t j = 0; j < access.max_keys(); ++j) {
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        const bool read = std::ranges::any_of(tiles, [&](const auto& t) {
          return t.kept && t.key_tile == j / shape.keys && t.head / (c.heads / c.kv_heads) == h;
        });
        if (read) continue;
        ++spoiled;
        for (int64_t d = 0; d < c.value_dim; ++d) set(problem, access.value(0, j, h), d, kNan);
      }
    }
    ASSERT_GT(spoiled, 0) << describe(c);
    problem.run();
    EXPECT_EQ(problem.out_bits(), before) << describe(c);
  });
}

TEST_P(SpecialValues, ANanScoreIsNeverSkippedOver) {
  for_each_case([](Case c) {
    c.inputs = Inputs::kPlanted;
    c.density = 0;  // everything but the first key tile is dropped
    c.order = BLASST_FORWARD;
    c.test = BLASST_TEST_RELATIVE;
    c.threshold = 1;
    const int64_t key = c.requests[0].keys - 3;
    Problem problem(c);
    const Access access(problem.params);
    set(problem, access.key(0, key, 0), 3, kNan);
    problem.run();
    const std::vector<float> out = problem.out();
    for (int64_t row = 0; row < c.requests[0].queries; ++row) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const bool reached = h < 2 && access.sees(0, row, h, key);
        for (int64_t d = 0; d < c.value_dim; ++d)
          ASSERT_EQ(std::isnan(out[(row * c.heads + h) * c.value_dim + d]), reached) << describe(c);
      }
    }
    EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
  });
}

TEST_P(SpecialValues, AScoreOfMinusInfinityIsMasked) {
  for_each_case([](Case c) {
    c.softcap = 0;
    Problem problem(c);
    const Access access(problem.params);
    const auto last = access.requests()[0];
    // Element 0 of every query is 1; keys at -inf there score -inf in every row.
    for (int64_t row = 0; row < last.rows; ++row)
      for (int64_t h = 0; h < c.heads; ++h) set(problem, access.query(0, row, h), 0, 1);
    // A stretch that covers a whole tile, the ends of its neighbours, and the very first keys.
    for (int64_t j = 0; j < 200; ++j)
      for (int64_t h = 0; h < c.kv_heads; ++h) set(problem, access.key(0, j, h), 0, -kInf);
    for (const float threshold : {0.0f, 0.9f}) {
      problem.thresholds = {threshold};
      problem.params.decision.test = {.kind = BLASST_TEST_RELATIVE,
                                      .values = problem.thresholds.data()};
      problem.run();
      EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
    }
    // What they hold as values then does not matter.
    const std::vector<std::byte> before = problem.out_bits();
    for (int64_t j = 0; j < 200; ++j) set(problem, access.value(0, j, 0), 1, 1e4f);
    problem.run();
    EXPECT_EQ(problem.out_bits(), before) << describe(c);
  });
}

TEST_P(SpecialValues, OnlyScoresOfMinusInfinityGiveZero) {
  for_each_case([](Case c) {
    Problem problem(c);
    const Access access(problem.params);
    for (int64_t row = 0; row < c.requests[0].queries; ++row)
      for (int64_t h = 0; h < c.heads; ++h) set(problem, access.query(0, row, h), 0, 1);
    for (int64_t j = 0; j < c.requests[0].keys; ++j)
      for (int64_t h = 0; h < c.kv_heads; ++h) set(problem, access.key(0, j, h), 0, -kInf);
    problem.run();
    for (const float x : problem.out()) ASSERT_EQ(x, 0) << describe(c);
    for (const float lse : problem.lse) ASSERT_EQ(lse, -kInf) << describe(c);
  });
}

TEST_P(SpecialValues, AnInfiniteScoreGivesNan) {
  for_each_case([](Case c) {
    Problem problem(c);
    const Access access(problem.params);
    set(problem, access.query(0, 1, 0), 0, 1);
    set(problem, access.key(0, 0, 0), 0, kInf);
    problem.run();
    EXPECT_TRUE(std::isnan(problem.out()[1 * c.heads * c.value_dim])) << describe(c);
    EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
  });
}

// With scores in int8 a key that is not finite has scores of NaN; its tile's other keys keep
// theirs.
TEST_P(SpecialValues, OfInt8ScoresReachTheRowsThatSeeTheKey) {
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    for (const float value : {kNan, kInf, -kInf}) {
      Case c = case_of(dtype, false);
      c.scores = BLASST_SCORES_INT8;
      expect_reach(
          c, [&](Problem& p) { set(p, Access(p.params).query(0, 2, 1), 5, value); },
          [](int64_t row, int64_t head) { return row == 2 && head == 1; });
      for (const float threshold : {0.0f, 1.0f}) {
        c.inputs = threshold > 0 ? Inputs::kPlanted : Inputs::kGaussian;
        c.test = BLASST_TEST_RELATIVE, c.threshold = threshold;
        const int64_t key = 200;
        Problem problem(c);
        const Access access(problem.params);
        set(problem, access.key(0, key, 1), 5, value);
        problem.run();
        const std::vector<float> out = problem.out();
        for (int64_t row = 0; row < c.requests[0].queries; ++row) {
          for (int64_t h = 0; h < c.heads; ++h) {
            const bool reached = h >= 2 && access.sees(0, row, h, key);
            for (int64_t d = 0; d < c.value_dim; ++d)
              ASSERT_EQ(std::isnan(out[(row * c.heads + h) * c.value_dim + d]), reached)
                  << "row " << row << " head " << h << ": " << describe(c);
          }
        }
        EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
      }
    }
  }
}

TEST_P(SpecialValues, HugeAndTinyScores) {
  for_each_case([](Case c) {
    for (const float scale : {1e-6f, 40.0f}) {
      c.scale = scale;
      for (const float threshold : {0.0f, 0.5f}) {
        c.test = BLASST_TEST_RELATIVE;
        c.threshold = threshold;
        Problem problem(c);
        problem.run();
        EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Cpu, SpecialValues, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace blasst::check
