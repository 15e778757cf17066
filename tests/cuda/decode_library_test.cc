// Decode on a GPU through the library: random problems against the reference.
#include <gtest/gtest.h>

#include <string>

#include "check/compare.h"
#include "check/device.h"

namespace blasst::check {
namespace {

TEST(DecodeOnGpu, RandomProblems) {
  for (const BackendInfo& backend : backends())
    if (backend.backend == BLASST_BACKEND_CUDA_SM90 && !backend.usable)
      GTEST_SKIP() << backend.detail;
  int64_t decisions = 0, skipped = 0;
  for (uint64_t seed = 0; seed < 200 && !HasFailure(); ++seed) {
    const Case c = for_gpu(random_case(seed));
    if (!c.decode) continue;
    Problem problem(c);
    run_on_gpu(problem, 2);
    const TileShape shape = tile_shape(gpu_params(problem), true);
    const Comparison comparison = compare(problem, shape, kTensorCoreRoundoff);
    EXPECT_EQ(comparison.mismatch, "") << "seed " << seed << ": " << describe(c);
    decisions += comparison.decisions;
    skipped += comparison.skipped;
  }
  EXPECT_GT(skipped, decisions / 20);
}

}  // namespace
}  // namespace blasst::check
