// The sm_90 decode kernels over keys and values in 8 bits.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

constexpr DType kCaches[] = {BLASST_INT8, BLASST_FLOAT8_E4M3};

struct Seen {
  int64_t decisions = 0, skipped = 0, rounded = 0;
};

void expect_agreement(const Case& c, Seen& seen) {
  Problem problem(c);
  const Comparison comparison = run_and_compare(problem);
  EXPECT_EQ(comparison.mismatch, "") << describe(c);
  seen.decisions += comparison.decisions;
  seen.skipped += comparison.skipped;
  seen.rounded += comparison.rounded;
}

class DecodeCache : public OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    if (!IsSkipped() && !gpu_kernels().caches_in_8_bits) GTEST_SKIP() << "no caches in 8 bits";
  }
};

// Cut into parts that can run side by side.
class DecodeCacheRandom : public DecodeCache, public testing::WithParamInterface<uint64_t> {};

TEST_P(DecodeCacheRandom, Problems) {
  Seen seen;
  for (uint64_t seed = 20 * GetParam(); seed < 20 * GetParam() + 20 && !HasFailure(); ++seed) {
    Case c = random_case(seed, 8'000'000);
    if (!c.decode) {
      c.decode = true;
      for (Lengths& r : c.requests) r.queries = 1;
    }
    c.values_in_keys = false;
    c.k_dtype = c.v_dtype = kCaches[seed % 2];
    c.scales_per_request = seed % 3 == 0, c.scales_per_head = seed % 5 < 3;
    SCOPED_TRACE("seed " + std::to_string(seed));
    expect_agreement(for_gpu(c), seen);
  }
  EXPECT_LE(seen.rounded, 1 + seen.decisions / 2000);
}
INSTANTIATE_TEST_SUITE_P(, DecodeCacheRandom, testing::Range<uint64_t>(0, 10));

TEST_F(DecodeCache, EveryRatio) {
  Seen seen;
  for (const DType cache : kCaches) {
    for (const DType dtype : {BLASST_FLOAT16, BLASST_BFLOAT16}) {
      for (const auto& [group, queries] : {std::pair<int64_t, int64_t>{1, 1},
                                           {4, 1},
                                           {8, 1},
                                           {16, 1},
                                           {6, 4},
                                           {4, 8},
                                           {64, 1},
                                           {1, 16}}) {
        for (const int64_t keys : {200, 1300})
          expect_agreement({.seed = 7,
                            .decode = true,
                            .dtype = dtype,
                            .requests = {{queries, keys}},
                            .heads = group,
                            .kv_heads = 1,
                            .head_dim = 128,
                            .value_dim = 128,
                            .k_dtype = cache,
                            .v_dtype = cache,
                            .inputs = Inputs::kPlanted,
                            .density = 0.3,
                            .causal = true,
                            .test = BLASST_TEST_RELATIVE,
                            .threshold = 0.01f},
                           seen);
      }
    }
  }
  EXPECT_GT(seen.skipped, seen.decisions / 3);
}

Case mixed_case(DType cache) {
  return {.seed = 3,
          .decode = true,
          .dtype = BLASST_BFLOAT16,
          .requests = {{2, 900}, {2, 0}, {2, 3000}, {2, 1}, {2, 64}},
          .heads = 8,
          .kv_heads = 2,
          .head_dim = 128,
          .value_dim = 128,
          .k_dtype = cache,
          .v_dtype = cache,
          .scales_per_request = true,
          .scales_per_head = true,
          .page_size = 64,
          .sinks = true,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.03f,
          .per_request = true,
          .per_head = true};
}

std::vector<std::byte> bits_of(const Case& c, bool report) {
  Problem problem(c);
  DeviceProblem(problem, report ? Reports::kAll : Reports::kCounts).run();
  return problem.out_bits();
}

TEST_F(DecodeCache, SameBitsInEveryLayoutAndRun) {
  for (const DType cache : kCaches) {
    const std::vector<std::byte> bits = bits_of(mixed_case(cache), false);
    for (int run = 0; run < 10; ++run) EXPECT_EQ(bits_of(mixed_case(cache), run % 2), bits);
    for (const Layout layout : {Layout::kRagged, Layout::kPaged}) {
      for (const int64_t page_size : {16, 64, 256}) {
        Case c = mixed_case(cache);
        c.layout = layout, c.page_size = page_size, c.head_major = page_size == 64;
        EXPECT_EQ(bits_of(c, false), bits) << describe(c);
      }
    }
  }
}

TEST_F(DecodeCache, RaggedQueries) {
  Seen seen;
  for (const DType cache : kCaches) {
    Case c = mixed_case(cache);
    c.ragged_queries = true;
    c.requests = {{2, 900}, {0, 500}, {4, 3000}, {1, 3}, {3, 64}, {4, 0}, {1, 2500}};
    expect_agreement(c, seen);
    for (Lengths& r : c.requests) r.queries = 4;
    const std::vector<std::byte> ragged = bits_of(c, false);
    c.ragged_queries = false;
    EXPECT_EQ(bits_of(c, false), ragged);
  }
}

TEST_F(DecodeCache, DenseIsThresholdZero) {
  for (const DType cache : kCaches) {
    Case c = mixed_case(cache);
    c.per_request = c.per_head = false;
    c.threshold = 0;
    Case dense = c;
    dense.test = BLASST_TEST_NONE;
    EXPECT_EQ(bits_of(c, false), bits_of(dense, false));
    EXPECT_EQ(bits_of(c, true), bits_of(dense, false));
  }
}

// Many short requests: work items are groups of splits, not splits.
TEST_F(DecodeCache, GroupsOfSplits) {
  Seen seen;
  for (const DType cache : kCaches) {
    Case c = mixed_case(cache);
    c.heads = 16, c.kv_heads = 4;
    c.requests = {};
    c.layout = Layout::kPaged, c.page_size = 32;
    for (int64_t b = 0; b < 70; ++b) c.requests.push_back({1, 17 * b + b * b % 700});
    c.requests.push_back({1, 6000});
    expect_agreement(c, seen);
  }
}

// Queries whose sizes fp16 has not, every pattern of 8 bits, and NaN.
TEST_F(DecodeCache, AnyNumbers) {
  for (const DType cache : kCaches) {
    for (const float size : {1e-30f, 1e20f}) {
      Case c = mixed_case(cache);
      c.requests = {{1, 1100}};
      Problem problem(c);
      problem.params.problem.scale = 0.1f / size;
      const Access access(problem.params);
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t d = 0; d < 128; ++d) {
          std::byte* at = access.query(0, 0, h) + 2 * d;
          const auto x = static_cast<float>(load_element(c.dtype, at));
          store_element(c.dtype, at, x * size);
        }
      for (int64_t j = 0; j < 1100; ++j)
        for (int64_t d = 0; d < 128; ++d)
          for (std::byte* row : {access.key(0, j, 0), access.value(0, j, 0)}) {
            row[d] = static_cast<std::byte>(j * 13 + d);
            if (std::isnan(load_element(cache, row + d))) row[d] = std::byte{};
          }
      EXPECT_EQ(run_and_compare(problem).mismatch, "") << size;
    }
  }
  for (const int64_t key : {5, 700, 1000}) {
    for (const bool value : {false, true}) {
      Case c = mixed_case(BLASST_FLOAT8_E4M3);
      c.requests = {{1, 1100}};
      Problem problem(c);
      const Access access(problem.params);
      *(value ? access.value(0, key, 1) : access.key(0, key, 1)) = std::byte{0xff};
      EXPECT_EQ(run_and_compare(problem).mismatch, "") << key << value;
    }
  }
}

// A query that is not finite reaches its row, and those that decide with it.
TEST_F(DecodeCache, InfiniteQueries) {
  for (const DType cache : kCaches) {
    for (const double x : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
      Case c = mixed_case(cache);
      c.requests = {{1, 1100}};
      Problem problem(c);
      store_element(c.dtype, Access(problem.params).query(0, 0, 1) + 2 * 3, x);
      EXPECT_EQ(run_and_compare(problem).mismatch, "") << x;
    }
  }
}

// One key far above the others, which are many: each counts little, all of them do not.
TEST_F(DecodeCache, ManySmallProbabilities) {
  constexpr int64_t kKeys = 20000;
  for (const DType cache : kCaches) {
    for (const double gap : {9.0, 13.0}) {
      Case c = mixed_case(cache);
      c.requests = {{1, kKeys}};
      c.test = BLASST_TEST_NONE;
      c.per_request = c.per_head = c.scales_per_request = c.scales_per_head = false;
      c.sinks = false;
      Problem problem(c);
      problem.params.problem.scale = static_cast<float>(gap / 64);
      const Access access(problem.params);
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t d = 0; d < c.head_dim; ++d)
          store_element(c.dtype, access.query(0, 0, h) + 2 * d, d == 0 ? 1 : 0);
      const double scale = problem.k_scales.empty() ? 1 : problem.k_scales[0];
      for (int64_t j = 0; j < kKeys; ++j)
        for (int64_t h = 0; h < c.kv_heads; ++h)
          for (int64_t d = 0; d < c.head_dim; ++d)
            store_element(cache, access.key(0, j, h) + d, d == 0 && j == 0 ? 64 / scale : 0);
      EXPECT_EQ(run_and_compare(problem).mismatch, "") << gap;
    }
  }
}

TEST_F(DecodeCache, GraphSeesNewScales) {
  Problem problem(mixed_case(BLASST_FLOAT8_E4M3));
  DeviceProblem device(problem, Reports::kCounts);
  Graph graph([&](cudaStream_t stream) {
    device.params.execution.stream = stream;
    device.launch();
  });
  device.params.execution.stream = nullptr;
  std::vector<std::byte> before;
  for (const float factor : {1.0f, 0.5f}) {
    std::vector<float> scales = problem.v_scales;
    for (float& x : scales) x *= factor;
    DeviceProblem::put(device.params.problem.v_scales.values, scales);
    device.mark();
    graph.replay();
    device.download();
    EXPECT_NE(problem.out_bits(), before);
    before = problem.out_bits();
    device.run();
    EXPECT_EQ(problem.out_bits(), before);
  }
}

}  // namespace
}  // namespace blasst::check
