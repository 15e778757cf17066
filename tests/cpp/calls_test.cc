// What `blasst verify` and the fuzzer ask of a problem beside its own call: it holds, and what is
// wrong shows.
#include "testing/calls.h"

#include <gtest/gtest.h>

#include <string>

#include "promises.h"

namespace blasst::check {
namespace {

class Calls : public OnEveryIsa {};

TEST_P(Calls, OfRandomProblemsAgree) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Problem problem(random_case(seed, 1'000'000));
    problem.run();
    SeededChoices choices(seed);
    EXPECT_EQ(check_calls(problem, choices), "")
        << "seed " << seed << ": " << describe(problem.description);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Calls, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

// An LSE that the forward did not report, a NaN that nothing looks at.
TEST(Calls, WrongNumbersAreNoticed) {
  Problem problem({.requests = {{70, 150}},
                   .sinks = true,
                   .causal = true,
                   .test = BLASST_TEST_RELATIVE,
                   .threshold = 0.01f});
  problem.run();
  EXPECT_EQ(check_gradients(problem), "");
  for (float& lse : problem.lse) lse += 0.01f;
  EXPECT_NE(check_gradients(problem), "");
  EXPECT_EQ(check_nan_threshold(problem), "");
  problem.params.decision.test = {};
  EXPECT_NE(check_nan_threshold(problem), "");
}

}  // namespace
}  // namespace blasst::check
