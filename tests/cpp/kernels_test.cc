// Kernels against the reference: random problems, then sweeps over what random problems meet too
// rarely.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/targets.h"
#include "promises.h"
#include "testing/compare.h"

namespace blasst::check {
namespace {

class Kernels : public OnEveryIsa {
 protected:
  // Runs the case and compares; returns what was seen.
  static Comparison expect_agreement(const Case& c) {
    Problem problem(c);
    problem.run();
    const Comparison comparison = compare(problem);
    EXPECT_EQ(comparison.mismatch, "") << describe(c);
    return comparison;
  }

  static void random_problems(bool decode, int count) {
    int64_t decisions = 0, skipped = 0, rounded = 0;
    for (uint64_t seed = 0; count > 0; ++seed) {
      const Case c = random_case(seed, 6'000'000);
      if (c.decode != decode) continue;
      --count;
      SCOPED_TRACE("seed " + std::to_string(seed));
      const Comparison comparison = expect_agreement(c);
      decisions += comparison.decisions, skipped += comparison.skipped,
          rounded += comparison.rounded;
    }
    EXPECT_GT(skipped, decisions / 20) << "too few skips to test anything";
    EXPECT_LE(rounded, 1 + decisions / 2000);
  }

  static std::vector<Case> both_phases(Case c) {
    Case decode = c;
    decode.decode = true;
    for (Lengths& r : decode.requests) r.queries = std::min<int64_t>(r.queries, 16);
    return {c, decode};
  }
};

TEST_P(Kernels, RandomPrefill) { random_problems(false, 60); }
TEST_P(Kernels, RandomDecode) { random_problems(true, 60); }

TEST_P(Kernels, EveryHeadDimension) {
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    for (int64_t dim = 16; dim <= 256; dim += 8) {
      const Case c{.dtype = dtype,
                   .requests = {{9, 70}},
                   .head_dim = dim,
                   .value_dim = 272 - dim,
                   .causal = true,
                   .test = BLASST_TEST_RELATIVE,
                   .threshold = 0.1f};
      for (const Case& phase : both_phases(c)) expect_agreement(phase);
      Case int8 = c;
      int8.scores = BLASST_SCORES_INT8;
      expect_agreement(int8);
      int8.k_dtype = BLASST_INT8;
      expect_agreement(int8);
    }
  }
}

TEST_P(Kernels, EveryHeadRatio) {
  for (int64_t group = 1; group <= 16; ++group) {
    const Case c{.dtype = BLASST_BFLOAT16,
                 .requests = {{5, 150}},
                 .heads = 2 * group,
                 .kv_heads = 2,
                 .head_dim = 32,
                 .value_dim = 32,
                 .causal = true,
                 .test = BLASST_TEST_RELATIVE,
                 .threshold = 0.1f};
    for (const Case& phase : both_phases(c)) expect_agreement(phase);
  }
}

TEST_P(Kernels, EdgeLengths) {
  for (const auto& [queries, keys] : std::vector<Lengths>{{1, 1},
                                                          {1, 63},
                                                          {1, 64},
                                                          {1, 65},
                                                          {63, 63},
                                                          {64, 64},
                                                          {65, 65},
                                                          {128, 128},
                                                          {257, 257},
                                                          {1, 0},
                                                          {0, 1},
                                                          {0, 0},
                                                          {70, 3},
                                                          {3, 300},
                                                          {129, 511}}) {
    for (const bool causal : {false, true}) {
      const Case c{.requests = {{queries, keys}},
                   .head_dim = 40,
                   .value_dim = 24,
                   .causal = causal,
                   .test = BLASST_TEST_RELATIVE,
                   .threshold = 0.2f};
      for (const Case& phase : both_phases(c))
        if (!phase.decode || queries > 0) expect_agreement(phase);
    }
  }
}

TEST_P(Kernels, DecodeOfManySplits) {
  for (const Order order : {BLASST_FORWARD, BLASST_REVERSE, BLASST_SINK_FIRST}) {
    for (const Inputs inputs : {Inputs::kDrift, Inputs::kPlanted}) {
      Case c{.decode = true,
             .dtype = BLASST_BFLOAT16,
             .requests = {{1, 20001}, {1, 64}, {1, 9000}},
             .heads = 4,
             .head_dim = 16,
             .value_dim = 16,
             .inputs = inputs,
             .layout = Layout::kPaged,
             .order = order,
             .test = BLASST_TEST_RELATIVE,
             .threshold = 0.02f};
      expect_agreement(c);
    }
  }
}

TEST_P(Kernels, EmptyBatch) {
  for (const bool decode : {false, true}) {
    Case c{.decode = decode, .requests = {}};
    expect_agreement(c);
  }
}

// Bfloat16 dot products are the better choice except on Intel's processors, and can be chosen.
TEST(Isas, TheBestComesFirst) {
  const std::vector<std::string> isas = cpu_isas();
  EXPECT_EQ(cpu_isa(), isas.front());
  const auto dots = std::ranges::find(isas, "avx512_bf16"),
             plain = std::ranges::find(isas, "avx512_vnni");
#if defined(__x86_64__)
  std::vector<std::string> built;
#define BLASST_NAME(name, ...) built.push_back(#name);
  BLASST_CPU_TARGETS(BLASST_NAME)
#undef BLASST_NAME
  const bool has_dots = __builtin_cpu_supports("avx512bf16") &&
                        __builtin_cpu_supports("avx512vnni") &&
                        std::ranges::count(built, "avx512_bf16");
  ASSERT_EQ(dots != isas.end(), has_dots) << "whatever Highway calls such a processor";
  EXPECT_TRUE(!has_dots || (plain < dots) == (__builtin_cpu_is("intel") != 0));
#endif
  if (dots == isas.end()) GTEST_SKIP() << "no such instructions here";
  set_cpu_isa("avx512_bf16");
  EXPECT_EQ(cpu_isa(), "avx512_bf16");
  set_cpu_isa(isas.front());
}

INSTANTIATE_TEST_SUITE_P(Cpu, Kernels, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace blasst::check
