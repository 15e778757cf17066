// The promises of the interface, one test each, on every instruction set.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check/compare.h"
#include "promises.h"

namespace blasst::check {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Everything a call wrote, to be compared bit for bit.
struct Written {
  std::vector<std::byte> out;
  std::vector<float> lse, bound;
  std::vector<int64_t> visitable, skipped;
  std::vector<uint32_t> bits;
  std::vector<uint64_t> gaps;
  std::vector<float> maxima;
  bool operator==(const Written&) const = default;
};

Written written(const Problem& p) {
  return {p.out_bits(),    p.lse,       p.dropped_mass_bound, p.tiles_visitable,
          p.tiles_skipped, p.tile_bits, p.gap_histogram,      p.tile_maxima};
}

Written run(const Case& c) {
  Problem problem(c);
  problem.run();
  return written(problem);
}

// Problems with several query tiles, key tiles and (decode) splits, and skips among them.
std::vector<Case> sparse_cases() {
  std::vector<Case> cases;
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    Case c = sparse_case(dtype);
    cases.push_back(c);
    c.inputs = Inputs::kPlanted;
    cases.push_back(c);
    c.decode = true;
    c.requests = {{2, 9000}, {2, 300}};
    cases.push_back(c);
    c.inputs = Inputs::kDrift;
    c.threshold = 0.02f;
    cases.push_back(c);
  }
  return cases;
}

// Rows of tile bits of a head, and heads that have some.
int64_t tiles_of(const Case& c) {
  int64_t tiles = 0;
  for (const Lengths& r : c.requests) tiles += c.decode ? 1 : (r.queries + 63) / 64;
  return tiles;
}
int64_t heads_of(const Case& c) { return c.decode ? c.kv_heads : c.heads; }

class Contract : public OnEveryIsa {};

TEST_P(Contract, NoThresholdAndThresholdZeroGiveTheSameBits) {
  for (Case c : sparse_cases()) {
    c.test = BLASST_TEST_NONE;
    const Written dense = run(c);
    const std::pair<TestKind, float> zeros[] = {{BLASST_TEST_RELATIVE, 0.0f},
                                                {BLASST_TEST_SCALE_FACTOR, 0.0f},
                                                {BLASST_TEST_ABSOLUTE, -kInf}};
    for (const auto& [kind, value] : zeros) {
      c.test = kind, c.threshold = value;
      EXPECT_EQ(run(c), dense) << describe(c);
    }
  }
}

TEST_P(Contract, TheSameCallTwiceGivesTheSameBits) {
  for (const Case& c : sparse_cases()) {
    Problem problem(c);
    problem.run();
    const Written first = written(problem);
    problem.run();
    EXPECT_EQ(written(problem), first) << describe(c);
  }
}

TEST_P(Contract, AnyNumberOfThreadsGivesTheSameBits) {
  for (Case c : sparse_cases()) {
    c.threads = 1;
    const Written one = run(c);
    for (const int threads : {2, 3, 5, 0}) {
      c.threads = threads;
      EXPECT_EQ(run(c), one) << describe(c);
    }
  }
}

TEST_P(Contract, LayoutsAgreeBitForBit) {
  for (Case c : sparse_cases()) {
    const Written dense = run(c);
    for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
      c.layout = layout;
      for (const int64_t padding : {0, 8, 3}) {
        c.padding = padding;
        c.head_major = padding == 3;
        c.ragged_queries = !c.decode && padding > 0;
        EXPECT_EQ(run(c), dense) << describe(c);
      }
    }
    c.layout = Layout::kPaged;
    for (const int64_t page_size : {1, 7, 16, 64, 100, 256}) {
      c.page_size = page_size;
      EXPECT_EQ(run(c), dense) << describe(c);
    }
  }
}

TEST_P(Contract, ARequestDoesNotDependOnItsBatch) {
  for (Case c : sparse_cases()) {
    const Written both = run(c);
    c.requests.resize(1);
    const Written alone = run(c);
    EXPECT_TRUE(std::equal(alone.out.begin(), alone.out.end(), both.out.begin())) << describe(c);
  }
}

TEST_P(Contract, TheFirstVisitedTileIsNeverSkipped) {
  for (Case c : sparse_cases()) {
    for (const Order order : {BLASST_FORWARD, BLASST_REVERSE, BLASST_SINK_FIRST}) {
      c.order = order;
      const std::pair<TestKind, float> strictest[] = {{BLASST_TEST_RELATIVE, 1.0f},
                                                      {BLASST_TEST_SCALE_FACTOR, 1e30f},
                                                      {BLASST_TEST_ABSOLUTE, kInf}};
      for (const auto& [kind, value] : strictest) {
        c.test = kind, c.threshold = value;
        Problem problem(c);
        problem.run();
        EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
        for (size_t i = 0; i < problem.lse.size(); ++i)
          ASSERT_TRUE(std::isfinite(problem.lse[i])) << "a row lost all its keys: " << describe(c);
      }
    }
  }
}

TEST_P(Contract, ARowWithoutAValidKeyGivesZero) {
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    for (const bool decode : {false, true}) {
      // 10 queries over 4 keys: causal leaves the first 6 rows nothing.
      Problem problem({.decode = decode,
                       .dtype = dtype,
                       .requests = {{10, 4}},
                       .sinks = true,
                       .causal = true,
                       .test = BLASST_TEST_RELATIVE,
                       .threshold = 0.5f});
      problem.run();
      const std::vector<float> out = problem.out();
      for (int64_t row = 0; row < 6; ++row) {
        for (int64_t h = 0; h < 2; ++h) {
          EXPECT_EQ(problem.lse[h * 10 + row], problem.sinks[h]);
          EXPECT_EQ(problem.dropped_mass_bound[h * 10 + row], 0);
          for (int64_t d = 0; d < 64; ++d) ASSERT_EQ(out[(row * 2 + h) * 64 + d], 0);
        }
      }
      EXPECT_TRUE(std::isfinite(problem.lse[6]));
    }
  }
}

TEST_P(Contract, AQueryTileHasTheThresholdOfItsPlace) {
  for (Case c : sparse_cases()) {
    c.test = BLASST_TEST_ABSOLUTE, c.threshold = 3;
    c.places = 3;
    Problem problem(c);
    problem.run();
    // Query tiles of 64 rows end at the last key; in decode a place is 64 keys.
    int64_t tile = 0;
    for (const Lengths& r : c.requests) {
      for (int64_t first = 0; first < r.queries; first += c.decode ? r.queries : 64, ++tile) {
        const int64_t place =
            std::clamp<int64_t>((first + r.keys - r.queries) / 64, 0, c.places - 1);
        Case one = c;
        one.places = 1;
        Problem alone(one);
        alone.thresholds[0] = problem.thresholds[place];
        alone.run();
        const int64_t words = std::ssize(problem.tile_bits) / tiles_of(c) / heads_of(c);
        for (int64_t h = 0; h < heads_of(c); ++h) {
          const int64_t row = (h * tiles_of(c) + tile) * words;
          for (int64_t w = 0; w < words; ++w)
            EXPECT_EQ(problem.tile_bits[row + w], alone.tile_bits[row + w]) << describe(c);
        }
      }
    }
  }
}

TEST_P(Contract, WhatIsReportedDoesNotChangeTheOutput) {
  for (const Case& c : sparse_cases()) {
    Problem problem(c);
    problem.run();
    const Written all = written(problem);
    const Report report = problem.params.report;
    // Each output alone is what it is among the others; out is the same with any.
    const auto alone = [&](auto Report::*member, auto& buffer, const auto& wanted) {
      problem.params.report = {};
      problem.params.report.*member = report.*member;
      problem.run();
      EXPECT_EQ(problem.out_bits(), all.out) << describe(c);
      EXPECT_EQ(buffer, wanted) << describe(c);
    };
    alone(&Report::lse, problem.lse, all.lse);
    alone(&Report::dropped_mass_bound, problem.dropped_mass_bound, all.bound);
    alone(&Report::tiles_visitable, problem.tiles_visitable, all.visitable);
    alone(&Report::tiles_skipped, problem.tiles_skipped, all.skipped);
    alone(&Report::tile_bits, problem.tile_bits, all.bits);
    alone(&Report::gap_histogram, problem.gap_histogram, all.gaps);
    problem.params.report = {.tile_maxima = report.tile_maxima,
                             .tile_maxima_stride = report.tile_maxima_stride};
    problem.run();
    EXPECT_EQ(problem.out_bits(), all.out) << describe(c);
    EXPECT_EQ(problem.tile_maxima, all.maxima) << describe(c);
    problem.params.report = {};
    problem.run();
    EXPECT_EQ(problem.out_bits(), all.out) << describe(c);
  }
}

TEST_P(Contract, TheGapHistogramOfADensePassGivesTheSparsityOfEveryThreshold) {
  // One split: the running maximum then depends on no threshold, and neither do the gaps.
  for (Case c : sparse_cases()) {
    if (c.decode) c.requests = {{2, 3000}, {2, 300}};
    c.test = BLASST_TEST_NONE;
    const Written dense = run(c);
    for (const int bin : {200, 400, 480}) {  // thresholds on the histogram's edges
      c.test = BLASST_TEST_RELATIVE;
      c.threshold = static_cast<float>(
          std::exp((bin - (BLASST_GAP_BINS - 2)) * BLASST_GAP_RANGE / (BLASST_GAP_BINS - 2)));
      const Written sparse = run(c);
      int64_t foretold = 0, skipped = 0;
      for (int64_t h = 0; h < c.heads; ++h)
        for (int i = 0; i <= bin; ++i)
          foretold += static_cast<int64_t>(dense.gaps[h * BLASST_GAP_BINS + i]);
      for (const int64_t count : sparse.skipped) skipped += count;
      EXPECT_NEAR(skipped, foretold, 2) << describe(c);  // a gap may round across the edge
    }
  }
}

TEST_P(Contract, AWorkspaceOfTheStatedSizeIsEnough) {
  for (const Case& c : sparse_cases()) {
    SCOPED_TRACE(describe(c));
    Problem problem(c);
    expect_workspace_is_enough(problem.params, workspace_bytes(problem.params, c.decode), [&] {
      problem.run();
      return written(problem);
    });
  }
}

TEST_P(Contract, WorkspaceGrowsWithRowsAtMost) {
  Case c{.requests = {{256, 1024}}, .threads = 2};
  const auto needed = [](const Case& problem) {
    const Problem p(problem);
    return static_cast<double>(workspace_bytes(p.params, problem.decode));
  };
  const double small = needed(c);
  c.requests = {{256, 8192}};
  EXPECT_LE(needed(c), small) << "keys must not count";
  c.requests = {{2048, 1024}};
  EXPECT_LE(needed(c), small * 8) << "rows, at most";
}

TEST_P(Contract, CallsFromSeveralThreadsAtOnce) { expect_the_same_at_once(sparse_cases(), run); }

INSTANTIATE_TEST_SUITE_P(Cpu, Contract, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace blasst::check
