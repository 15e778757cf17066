// The prefill on a GPU, through the library: against the reference and against itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

class PrefillOnGpu : public OnGpu {};

// Cut into parts that can run side by side.
class PrefillRandom : public PrefillOnGpu, public testing::WithParamInterface<uint64_t> {};

void compare_random_problems(uint64_t part, Scores scores) {
  int64_t decisions = 0, skipped = 0;
  for (uint64_t seed = 20 * part; seed < 20 * part + 20 && !testing::Test::HasFailure(); ++seed) {
    Case c = random_case(seed);
    c.decode = false;
    c.scores = scores;
    Problem problem(for_gpu(c));
    const Comparison comparison = run_and_compare(problem);
    EXPECT_EQ(comparison.mismatch, "") << "seed " << seed << ": " << describe(problem.description);
    decisions += comparison.decisions;
    skipped += comparison.skipped;
  }
  EXPECT_GT(skipped, 0) << "of " << decisions;
}

TEST_P(PrefillRandom, Problems) { compare_random_problems(GetParam(), BLASST_SCORES_EXACT); }
TEST_P(PrefillRandom, Int8Scores) {
  if (!gpu_kernels().int8_scores) GTEST_SKIP() << "no scores in int8";
  compare_random_problems(GetParam(), BLASST_SCORES_INT8);
}
INSTANTIATE_TEST_SUITE_P(, PrefillRandom, testing::Range<uint64_t>(0, 10));

// Long enough for many items a block, both warpgroups apart, and every stage of every ring.
Case long_case(DType dtype, HeadSizes sizes) {
  return {.seed = 7,
          .dtype = dtype,
          .requests = {{1500, 2100}, {1500, 900}},
          .heads = 4,
          .kv_heads = 2,
          .head_dim = sizes.qk,
          .value_dim = sizes.value,
          .inputs = Inputs::kDrift,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.02f};
}

std::vector<std::byte> bits(Case c, int repeats = 1) {
  Problem problem(c);
  DeviceProblem device(problem);
  device.mark();
  for (int i = 0; i < repeats; ++i) device.launch();
  device.download();
  return problem.out_bits();
}

// Int8 takes queries and values of one size.
std::vector<Scores> scores_of(HeadSizes sizes) {
  if (sizes.qk != sizes.value || !gpu_kernels().int8_scores) return {BLASST_SCORES_EXACT};
  return {BLASST_SCORES_EXACT, BLASST_SCORES_INT8};
}

class PrefillDims : public SizesOnGpu {
 protected:
  PrefillDims() : SizesOnGpu(false) {}
};

TEST_P(PrefillDims, ThresholdZeroIsDense) {
  for (const DType dtype : {BLASST_BFLOAT16, BLASST_FLOAT16}) {
    for (const Scores scores : scores_of(GetParam())) {
      Case c = long_case(dtype, GetParam());
      c.scores = scores;
      c.threshold = 0;
      const std::vector<std::byte> zero = bits(c);
      c.test = BLASST_TEST_NONE;
      EXPECT_EQ(bits(c), zero);
    }
  }
}

TEST_P(PrefillDims, SameBitsInEveryRunAndLayout) {
  for (const Scores scores : scores_of(GetParam())) {
    Case c = long_case(BLASST_BFLOAT16, GetParam());
    c.scores = scores;
    const std::vector<std::byte> first = bits(c);
    EXPECT_EQ(bits(c, 5), first);
    c.ragged_queries = true;
    for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
      for (const int64_t page_size : {16, 64, 256}) {
        c.layout = layout;
        c.page_size = page_size;
        c.head_major = page_size == 64;
        EXPECT_EQ(bits(c), first) << describe(c);
      }
    }
  }
}

// Keys in int8 under scores in int8, beside values of 16 and of 8 bits: the reference's decisions,
// and the same bits from every layout.
TEST_P(PrefillDims, Int8ScoresTakeInt8KeysAsTheyAre) {
  if (scores_of(GetParam()).size() < 2) GTEST_SKIP() << "no scores in int8";
  for (const std::optional<DType> values :
       {std::optional<DType>(), std::optional(BLASST_INT8), std::optional(BLASST_FLOAT8_E4M3)}) {
    Case c = long_case(values == BLASST_INT8 ? BLASST_FLOAT16 : BLASST_BFLOAT16, GetParam());
    c.requests = {{700, 980}, {700, 420}};  // the reference takes its time
    c.scores = BLASST_SCORES_INT8;
    c.k_dtype = BLASST_INT8, c.v_dtype = values;
    c.scales_per_head = c.scales_per_request = true;
    c.scales_are_powers = values.has_value();  // values are rounded once more otherwise
    Problem problem(c);
    const Comparison comparison = run_and_compare(problem);
    EXPECT_EQ(comparison.mismatch, "") << describe(c);
    EXPECT_GT(comparison.skipped, 0) << describe(c);
    const std::vector<std::byte> first = problem.out_bits();
    EXPECT_EQ(bits(c, 3), first);
    c.ragged_queries = true;
    for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
      c.layout = layout;
      c.head_major = layout == Layout::kPaged;
      c.padding = 16;
      EXPECT_EQ(bits(c), first) << describe(c);
    }
    c.layout = Layout::kDense, c.ragged_queries = false, c.padded = true;
    c.softcap = 20, c.sinks = true;
    Problem padded(c);
    EXPECT_EQ(run_and_compare(padded).mismatch, "") << describe(c);
  }
}

// A key that is not finite makes the rows NaN that see it, a query its own row, and no other.
TEST_P(PrefillDims, NotFiniteReachesItsRows) {
  constexpr int64_t kKey = 300, kRow = 500;
  for (const Scores scores : scores_of(GetParam())) {
    for (const float value : {NAN, INFINITY}) {
      Case c = long_case(BLASST_BFLOAT16, GetParam());
      c.scores = scores;
      c.requests = {{700, 700}};
      c.threshold = 0.5f;
      Problem problem(c);
      const Access access(problem.params);
      store_element(c.dtype, const_cast<std::byte*>(access.key(0, kKey, 0)), value);
      store_element(c.dtype, const_cast<std::byte*>(access.query(0, kRow, 3)), value);
      DeviceProblem(problem).run();
      const std::vector<float> out = problem.out();
      for (int64_t row = 0; row < 700; ++row) {
        for (int64_t h = 0; h < c.heads; ++h) {
          const bool expected = (h / 2 == 0 && row >= kKey) || (h == 3 && row == kRow);
          // With exact scores an infinity may give a score of -inf, which is no key at all.
          if (expected && scores == BLASST_SCORES_EXACT && value == INFINITY) continue;
          EXPECT_EQ(std::isnan(out[(row * c.heads + h) * c.value_dim]), expected)
              << "scores " << scores << ", row " << row << ", head " << h;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, PrefillDims, testing::ValuesIn(kHeadSizes), name_of_sizes);

// Rows that see nothing, and rows whose band and window have little in common.
TEST_F(PrefillOnGpu, BandsInAWindow) {
  for (const int64_t window : {0, 100}) {
    Case c = long_case(BLASST_BFLOAT16, {64, 64});
    c.requests = {{300, 400}, {300, 200}};
    c.bands = true;
    c.window_left = window;
    for (c.seed = 0; c.seed < 4; ++c.seed) {
      Problem problem(c);
      EXPECT_EQ(run_and_compare(problem).mismatch, "") << describe(c);
    }
  }
}

// Requests are found whatever their number of rows, and whether or not the call knows the longest.
TEST_F(PrefillOnGpu, RaggedRequestsOfAnyLength) {
  for (const auto& [sizes, scores] : {std::pair<HeadSizes, Scores>{{64, 64}, BLASST_SCORES_EXACT},
                                      {{128, 128}, BLASST_SCORES_EXACT},
                                      {{128, 128}, BLASST_SCORES_INT8},
                                      {{192, 128}, BLASST_SCORES_EXACT}}) {
    if (scores == BLASST_SCORES_INT8 && !gpu_kernels().int8_scores) continue;
    if (!std::ranges::count(gpu_kernels().prefill_sizes, sizes)) continue;
    Case c = long_case(BLASST_BFLOAT16, sizes);
    c.scores = scores;
    c.ragged_queries = true;
    c.layout = Layout::kRagged;
    c.requests = {{0, 0}, {700, 900}, {0, 5}};
    for (int64_t i = 0; i < 600; ++i) c.requests.push_back({i % 7 == 0 ? 0 : i % 11, i % 13});
    c.requests.push_back({390, 390});
    Problem problem(c);
    DeviceProblem device(problem);
    device.run();
    EXPECT_EQ(run_and_compare(problem).mismatch, "");
    const std::vector<std::byte> wanted = problem.out_bits();
    AttentionParams& params = device.params;
    blasst::Problem& p = params.problem;
    params.report = {};
    for (const auto& [rows, keys] :
         {std::pair<int64_t, int64_t>{700, 900}, {0, 0}, {p.rows, 1 << 20}}) {
      p.query_length = rows, p.kv.key_length = keys;
      device.run();
      EXPECT_EQ(problem.out_bits(), wanted) << rows << ' ' << keys;
    }
  }
}

TEST_F(PrefillOnGpu, NothingToDo) {
  for (const Lengths lengths : {Lengths{0, 0}, Lengths{0, 100}, Lengths{70, 0}}) {
    Case c = long_case(BLASST_BFLOAT16, {128, 128});
    c.requests = {lengths, lengths};
    Problem problem(c);
    EXPECT_EQ(run_and_compare(problem).mismatch, "") << describe(c);
  }
}

}  // namespace
}  // namespace blasst::check
