// Decode on a GPU through the library: random problems against the reference.
#include <gtest/gtest.h>

#include <string>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"

namespace blasst::check {
namespace {

class DecodeOnGpu : public OnGpu {};

TEST_F(DecodeOnGpu, RandomProblems) {
  int64_t decisions = 0, skipped = 0;
  for (uint64_t seed = 0; seed < 200 && !HasFailure(); ++seed) {
    const Case c = for_gpu(random_case(seed));
    if (!c.decode) continue;
    Problem problem(c);
    const Comparison comparison = run_and_compare(problem);
    EXPECT_EQ(comparison.mismatch, "") << "seed " << seed << ": " << describe(c);
    decisions += comparison.decisions;
    skipped += comparison.skipped;
  }
  EXPECT_GT(skipped, decisions / 20);
}

}  // namespace
}  // namespace blasst::check
