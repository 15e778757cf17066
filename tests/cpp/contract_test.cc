// The promises of the interface, one test each, on every instruction set.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "promises.h"
#include "testing/compare.h"

namespace blasst::check {
namespace {

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

// Rows of tile bits of a head, those of the requests' own query tiles, and heads that have some.
int64_t tiles_of(const Case& c) {
  int64_t tiles = 0;
  for (const Lengths& r : c.requests) tiles += c.decode ? 1 : (r.queries + 63) / 64;
  return tiles;
}
int64_t heads_of(const Case& c) { return c.decode ? c.kv_heads : c.heads; }

// Of an array of tiles, what the requests use of the room that the layout's limits give them.
template <typename T>
std::vector<T> used(const std::vector<T>& tiles, const Case& c, int64_t room, int64_t row_size,
                    int64_t row_used) {
  std::vector<T> all;
  for (int64_t h = 0; h < heads_of(c); ++h) {
    for (int64_t i = 0; i < tiles_of(c); ++i) {
      const auto row = tiles.begin() + (h * room + i) * row_size;
      all.insert(all.end(), row, row + row_used);
    }
  }
  return all;
}

Written written(const Problem& p) {
  const Case& c = p.description;
  const Plan tiles = plan(p.params, c.decode);
  const int64_t keys = std::ranges::max(c.requests, {}, &Lengths::keys).keys;
  const int64_t key_tiles = (keys + 63) / 64;
  return {p.out_bits(),
          p.lse,
          p.dropped_mass_bound,
          p.tiles_visitable,
          p.tiles_skipped,
          used(p.tile_bits, c, tiles.query_tiles, tiles.tile_words, (key_tiles + 31) / 32),
          p.gap_histogram,
          used(p.tile_maxima, c, tiles.query_tiles, p.params.report.tile_maxima_stride, key_tiles)};
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
    c.scores = BLASST_SCORES_INT8;
    cases.push_back(c);
    c.inputs = Inputs::kPlanted;
    cases.push_back(c);
    c.k_dtype = BLASST_INT8;
    cases.push_back(c);
    c.k_dtype = {};
    c.scores = BLASST_SCORES_EXACT;
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
        c.ragged_queries = padding > 0;
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

// Of the rows of the requests' own: a padded batch has rows besides.
TEST_P(Contract, APaddedBatchHasTheBitsOfARaggedOne) {
  for (Case c : sparse_cases()) {
    c.requests = c.decode ? std::vector<Lengths>{{3, 9000}, {0, 70}, {1, 300}}
                          : std::vector<Lengths>{{200, 500}, {0, 70}, {77, 230}, {1, 1}};
    c.sinks = true;
    c.ragged_queries = true;
    Problem ragged(c);
    ragged.run();
    c.ragged_queries = false, c.padded = true;
    Problem padded(c);
    padded.run();
    EXPECT_EQ(compare(padded).mismatch, "") << describe(c);
    const int64_t room = padded.params.problem.query_length, heads = c.heads;
    const std::vector<std::byte> out = padded.out_bits(), wanted = ragged.out_bits();
    const int64_t row_bytes = std::ssize(wanted) / ragged.params.problem.rows;
    for (int64_t b = 0; b < std::ssize(c.requests); ++b) {
      for (int64_t row = 0; row < room; ++row) {
        const int64_t from = ragged.cu_queries[b] + row, to = b * room + row;
        const auto bits = std::span(out).subspan(to * row_bytes, row_bytes);
        const bool in_use = row < c.requests[b].queries;
        if (in_use) {
          EXPECT_TRUE(
              std::ranges::equal(bits, std::span(wanted).subspan(from * row_bytes, row_bytes)));
        } else {
          EXPECT_TRUE(std::ranges::all_of(bits, [](std::byte x) { return x == std::byte{0}; }));
        }
        for (int64_t h = 0; h < heads; ++h)
          EXPECT_EQ(padded.lse[h * padded.params.problem.batch * room + to],
                    in_use ? ragged.lse[h * ragged.params.problem.rows + from] : -kInf);
      }
    }
    EXPECT_EQ(padded.tiles_skipped, ragged.tiles_skipped) << describe(c);
    EXPECT_EQ(padded.tiles_visitable, ragged.tiles_visitable) << describe(c);
    EXPECT_EQ(padded.gap_histogram, ragged.gap_histogram) << describe(c);
  }
}

// Whichever way it is said that no row looks ahead, rows before every key are padding.
TEST_P(Contract, AWindowWithoutKeysAheadIsCausal) {
  for (Case c : sparse_cases()) {
    if (c.decode) continue;
    c.requests = {{200, 130}, {0, 70}, {77, 230}, {130, 65}};
    c.padded = true;
    c.causal = true, c.window_right = -1;
    Problem causal(c);
    causal.run();
    c.causal = false, c.window_right = 0;
    Problem window(c);
    window.run();
    EXPECT_EQ(compare(window).mismatch, "") << describe(c);
    EXPECT_EQ(window.out_bits(), causal.out_bits()) << describe(c);
    EXPECT_EQ(window.tile_bits, causal.tile_bits) << describe(c);
    EXPECT_EQ(window.tiles_visitable, causal.tiles_visitable) << describe(c);
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
        // The slow part; random problems have the other tests.
        if (kind == BLASST_TEST_ABSOLUTE) EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
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
    const auto alone = [&](auto Report::*member, auto Written::*reported) {
      problem.params.report = {};
      problem.params.report.*member = report.*member;
      problem.run();
      EXPECT_EQ(problem.out_bits(), all.out) << describe(c);
      EXPECT_EQ(written(problem).*reported, all.*reported) << describe(c);
    };
    alone(&Report::lse, &Written::lse);
    alone(&Report::dropped_mass_bound, &Written::bound);
    alone(&Report::tiles_visitable, &Written::visitable);
    alone(&Report::tiles_skipped, &Written::skipped);
    alone(&Report::tile_bits, &Written::bits);
    alone(&Report::gap_histogram, &Written::gaps);
    problem.params.report = {.tile_maxima = report.tile_maxima,
                             .tile_maxima_stride = report.tile_maxima_stride};
    problem.run();
    EXPECT_EQ(problem.out_bits(), all.out) << describe(c);
    EXPECT_EQ(written(problem).maxima, all.maxima) << describe(c);
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
    expect_workspace_is_enough(problem.params, plan(problem.params, c.decode).workspace_bytes, [&] {
      problem.run();
      return written(problem);
    });
  }
}

TEST_P(Contract, WorkspaceGrowsWithRowsAtMost) {
  Case c{.requests = {{256, 1024}}, .threads = 2};
  const auto needed = [](const Case& problem) {
    const Problem p(problem);
    return static_cast<double>(plan(p.params, problem.decode).workspace_bytes);
  };
  const double small = needed(c);
  c.requests = {{256, 8192}};
  EXPECT_LE(needed(c), small) << "keys must not count";
  c.requests = {{2048, 1024}};
  EXPECT_LE(needed(c), small * 8) << "rows, at most";
}

// Integers are exact. What softmax makes of them is, too, where multiplications and additions are
// fused alike.
TEST(Int8Scores, DecideAlikeOnEveryInstructionSet) {
  for (Case c : sparse_cases()) {
    if (c.scores != BLASST_SCORES_INT8) continue;
    for (const TestKind test : {BLASST_TEST_RELATIVE, BLASST_TEST_ABSOLUTE}) {
      c.test = test;
      c.threshold = test == BLASST_TEST_ABSOLUTE ? 8.0f : 0.2f;
      std::vector<Written> all;
      std::optional<std::vector<std::byte>> fused_out;  // of the first that fuses
      for (const std::string& isa : cpu_isas()) {
        set_cpu_isa(isa);
        all.push_back(run(c));
        const Written &here = all.back(), &first = all.front();
        EXPECT_EQ(here.bits, first.bits) << isa << " " << describe(c);
        EXPECT_EQ(here.skipped, first.skipped) << isa << " " << describe(c);
        EXPECT_EQ(here.gaps, first.gaps) << isa << " " << describe(c);
        EXPECT_EQ(here.maxima, first.maxima) << isa << " " << describe(c);
        if (isa == "sse4" || isa == "avx512_bf16") continue;
        if (!fused_out) fused_out = here.out;
        EXPECT_EQ(here.out, *fused_out) << isa << " " << describe(c);
      }
      set_cpu_isa(cpu_isas().front());
      EXPECT_NE(all[0].skipped, std::vector<int64_t>(all[0].skipped.size())) << describe(c);
    }
  }
}

TEST_P(Contract, CallsFromSeveralThreadsAtOnce) { expect_the_same_at_once(sparse_cases(), run); }

INSTANTIATE_TEST_SUITE_P(Cpu, Contract, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace blasst::check
