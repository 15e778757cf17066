// Multi-head latent attention: keys and values of different sizes in prefill; in decode one KV head
// of latents, whose values are the first elements of its keys.
#include <gtest/gtest.h>

#include <tuple>
#include <utility>
#include <vector>

#include "problem/problem.h"
#include "promises.h"
#include "testing/calls.h"
#include "testing/compare.h"

namespace blasst::check {
namespace {

class Mla : public OnEveryIsa {};

Case expanded_case(DType dtype, int64_t head_dim, int64_t value_dim) {
  return {.seed = 3,
          .dtype = dtype,
          .requests = {{100, 200}},
          .heads = 2,
          .kv_heads = 2,
          .head_dim = head_dim,
          .value_dim = value_dim,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.5f};
}

Case latent_case(DType dtype, int64_t heads, int64_t positions, int64_t keys) {
  return {.seed = 7,
          .decode = true,
          .dtype = dtype,
          .requests = {{positions, keys}, {positions, 70}},
          .heads = heads,
          .kv_heads = 1,
          .head_dim = 576,
          .value_dim = 512,
          .values_in_keys = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.5f};
}

// One of two splits, one of several positions, one of many heads.
std::vector<Case> latent_cases() {
  std::vector<Case> cases = {latent_case(BLASST_BFLOAT16, 8, 1, 6200),
                             latent_case(BLASST_FLOAT16, 16, 4, 150),
                             latent_case(BLASST_FLOAT32, 128, 1, 130)};
  for (size_t i = 0; i < 2; ++i) cases[i].layout = Layout::kPaged, cases[i].page_size = 64;
  return cases;
}

TEST_P(Mla, PrefillAndItsGradientsAgreeWithTheReference) {
  Case int8 = expanded_case(BLASST_BFLOAT16, 576, 64);
  int8.scores = BLASST_SCORES_INT8;
  for (const Case& c :
       {expanded_case(BLASST_BFLOAT16, 192, 128), expanded_case(BLASST_FLOAT16, 96, 64),
        expanded_case(BLASST_FLOAT32, 576, 512), int8}) {
    Problem problem(c);
    problem.run();
    EXPECT_GT(skipped(problem), 0) << describe(c);
    EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
    if (has_gradients(problem)) EXPECT_EQ(check_gradients(problem), "") << describe(c);
  }
}

TEST_P(Mla, DecodeOverLatentsAgreesWithTheReference) {
  for (const Case& c : latent_cases()) {
    Problem problem(c);
    problem.run();
    EXPECT_GT(skipped(problem), 0) << describe(c);
    EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
  }
}

TEST_P(Mla, ValuesInKeysGiveTheBitsOfACopy) {
  for (const Case& c : latent_cases()) {
    Problem problem(c);
    problem.run();
    const auto wanted = std::pair(problem.out_bits(), problem.lse);
    View& v = problem.params.problem.kv.v;
    const auto* data = static_cast<const std::byte*>(v.data);
    std::vector<std::byte> copy(data, data + v.elements * (c.dtype == BLASST_FLOAT32 ? 4 : 2));
    v.data = copy.data();
    problem.run();
    EXPECT_EQ(std::pair(problem.out_bits(), problem.lse), wanted) << describe(c);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Mla, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

TEST(ValuesLieInKeys, OnlyIfEveryRowDoes) {
  for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
    Case c = latent_case(BLASST_BFLOAT16, 8, 1, 100);
    c.layout = layout;
    const auto lie = [&](const auto& change) {
      Problem problem(c);
      change(problem.params.problem);
      return problem::make_scalar_problem(problem.params, problem::Phase::kDecode)
          .values_lie_in_keys();
    };
    const auto moved = [](int64_t elements) {
      return [elements](blasst_problem& p) {
        p.kv.v.data = static_cast<std::byte*>(p.kv.k.data) + 2 * elements;
      };
    };
    EXPECT_TRUE(lie(moved(0)));
    EXPECT_TRUE(lie(moved(64)));
    EXPECT_FALSE(lie(moved(65)));
    EXPECT_FALSE(lie(moved(-1)));
    EXPECT_FALSE(lie([](blasst_problem& p) { p.kv.v.stride_token += 8; }));
    EXPECT_TRUE(lie([](blasst_problem& p) { p.kv.v.stride_head += 8; }));  // of one head
    c.kv_heads = 2;
    EXPECT_FALSE(lie([](blasst_problem& p) { p.kv.v.stride_head += 8; }));
  }
}

}  // namespace
}  // namespace blasst::check
