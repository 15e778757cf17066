// What the host checks before a call reaches the portable kernels. No GPU needed.
#include <gtest/gtest.h>

#include "cuda/backend.h"
#include "cuda/sm80/prefill/plan.h"
#include "cuda/sm90/prefill/plan.h"
#include "plan_cases.h"

namespace blasst::cuda::prefill::sm80 {
namespace {

using P = AttentionParams;

P dense() {
  P p = dense_call(kRoom);
  p.execution.workspace_bytes = plan(p).workspace_bytes;
  return p;
}

P paged() { return paged_call(dense()); }

class Sm80PlanRejects : public testing::TestWithParam<Bad> {};

TEST_P(Sm80PlanRejects, AndSaysWhy) { expect_refusal(GetParam(), plan_launch); }

INSTANTIATE_TEST_SUITE_P(
    , Sm80PlanRejects,
    testing::ValuesIn(refused(dense, paged,
                              {{"Int8",
                                dense,
                                [](P& p) { p.decision.scores = BLASST_SCORES_INT8; },
                                {"cuda-sm80", "scores is int8", "prefill has exact scores"},
                                BLASST_UNSUPPORTED}})),
    name_of);

TEST(Sm80Plan, HasTheTilesOfTheHopperKernels) {
  P p = dense();
  const Plan own = plan(p), hopper = prefill::plan(p);
  EXPECT_EQ(own.backend, BLASST_BACKEND_CUDA_SM80);
  EXPECT_EQ(own.shape.query_rows, hopper.shape.query_rows);
  EXPECT_EQ(own.shape.keys, hopper.shape.keys);
  EXPECT_EQ(own.tile_words, hopper.tile_words);
  EXPECT_EQ(own.workspace_bytes, hopper.workspace_bytes);
}

TEST(Sm80Plan, OtherPhasesAreRefusedByName) {
  const auto refusal = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), BLASST_UNSUPPORTED);
      return error.what();
    }
    return "accepted";
  };
  const api::Backend& backend = sm80_backend();
  EXPECT_EQ(refusal([&] { backend.plan(dense(), problem::Phase::kDecode); }),
            "cuda-sm80: it has no decode; it does prefill");
  EXPECT_EQ(refusal([&] { backend.run(dense(), problem::Phase::kDecode); }),
            "cuda-sm80: it has no decode; it does prefill");
  EXPECT_EQ(refusal([&] { backend.plan(BackwardParams{}); }),
            "cuda-sm80: it has no backward; it does prefill");
}

}  // namespace
}  // namespace blasst::cuda::prefill::sm80
