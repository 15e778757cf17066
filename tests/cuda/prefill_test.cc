// The prefill on a GPU, through the library: against the reference and against itself.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"

namespace blasst::check {
namespace {

class PrefillOnGpu : public OnGpu {};

Comparison compare_on_gpu(Problem& problem) {
  DeviceProblem(problem).run();
  return compare(problem, gpu_plan(problem), kTensorCoreRoundoff);
}

// Cut into parts that can run side by side.
class PrefillRandom : public PrefillOnGpu, public testing::WithParamInterface<uint64_t> {};

TEST_P(PrefillRandom, Problems) {
  int64_t decisions = 0, skipped = 0;
  for (uint64_t seed = 20 * GetParam(); seed < 20 * GetParam() + 20 && !HasFailure(); ++seed) {
    Case c = random_case(seed);
    c.decode = false;
    Problem problem(for_gpu(c));
    const Comparison comparison = compare_on_gpu(problem);
    EXPECT_EQ(comparison.mismatch, "") << "seed " << seed << ": " << describe(problem.description);
    decisions += comparison.decisions;
    skipped += comparison.skipped;
  }
  EXPECT_GT(skipped, 0) << "of " << decisions;
}
INSTANTIATE_TEST_SUITE_P(, PrefillRandom, testing::Range<uint64_t>(0, 10));

// Long enough for many items a block, both warpgroups apart, and every stage of every ring.
Case long_case(DType dtype, int64_t dim) {
  return {.seed = 7,
          .dtype = dtype,
          .requests = {{1500, 2100}, {1500, 900}},
          .heads = 4,
          .kv_heads = 2,
          .head_dim = dim,
          .value_dim = dim,
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

class PrefillDims : public PrefillOnGpu, public testing::WithParamInterface<int64_t> {};

TEST_P(PrefillDims, ThresholdZeroIsDense) {
  for (const DType dtype : {BLASST_BFLOAT16, BLASST_FLOAT16}) {
    Case c = long_case(dtype, GetParam());
    c.threshold = 0;
    const std::vector<std::byte> zero = bits(c);
    c.test = BLASST_TEST_NONE;
    EXPECT_EQ(bits(c), zero);
  }
}

TEST_P(PrefillDims, SameBitsInEveryRunAndLayout) {
  Case c = long_case(BLASST_BFLOAT16, GetParam());
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

INSTANTIATE_TEST_SUITE_P(, PrefillDims, testing::Values(64, 128, 256));

// Rows that see nothing, and rows whose band and window have little in common.
TEST_F(PrefillOnGpu, BandsInAWindow) {
  for (const int64_t window : {0, 100}) {
    Case c = long_case(BLASST_BFLOAT16, 64);
    c.requests = {{300, 400}, {300, 200}};
    c.bands = true;
    c.window_left = window;
    for (c.seed = 0; c.seed < 4; ++c.seed) {
      Problem problem(c);
      EXPECT_EQ(compare_on_gpu(problem).mismatch, "") << describe(c);
    }
  }
}

// Requests are found whatever their number of rows, and whether or not the call knows the longest.
TEST_F(PrefillOnGpu, RaggedRequestsOfAnyLength) {
  for (const int64_t dim : {64, 128}) {
    Case c = long_case(BLASST_BFLOAT16, dim);
    c.ragged_queries = true;
    c.layout = Layout::kRagged;
    c.requests = {{0, 0}, {700, 900}, {0, 5}};
    for (int64_t i = 0; i < 600; ++i) c.requests.push_back({i % 7 == 0 ? 0 : i % 11, i % 13});
    c.requests.push_back({390, 390});
    Problem problem(c);
    DeviceProblem device(problem);
    device.run();
    EXPECT_EQ(compare(problem, gpu_plan(problem), kTensorCoreRoundoff).mismatch, "");
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
    Case c = long_case(BLASST_BFLOAT16, 128);
    c.requests = {lengths, lengths};
    Problem problem(c);
    EXPECT_EQ(compare_on_gpu(problem).mismatch, "") << describe(c);
  }
}

}  // namespace
}  // namespace blasst::check
