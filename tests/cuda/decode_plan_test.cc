// What the host checks before a decode call reaches the GPU, and what it passes on. No GPU needed.
#include <gtest/gtest.h>

#include "cuda/sm90/decode/plan.h"
#include "plan_cases.h"

namespace blasst::cuda::decode {
namespace {

using P = AttentionParams;

P dense() {
  P p = dense_call(2);
  p.problem.kv.lengths = array<int32_t>(0x70000000);
  p.execution.workspace_bytes = plan(p).workspace_bytes;
  return p;
}

P paged() {
  P p = paged_call(dense());
  p.execution.workspace_bytes = plan(p).workspace_bytes;
  return p;
}

class DecodePlanRejects : public testing::TestWithParam<Bad> {};

TEST_P(DecodePlanRejects, AndSaysWhy) { expect_refusal(GetParam(), plan_launch); }

INSTANTIATE_TEST_SUITE_P(
    , DecodePlanRejects,
    testing::ValuesIn(refused(
        dense, paged,
        {{"TooManyRows",
          dense,
          [](P& p) { p.problem.heads = 32, p.problem.query_length = 5; },
          {"80 rows", "64"},
          BLASST_UNSUPPORTED},
         {"TooManyPositions", dense, [](P& p) { p.problem.query_length = 17; }, {"17", "1 to 16"}},
         {"Ragged",
          dense,
          [](P& p) { p.problem.query_layout = BLASST_LAYOUT_RAGGED, p.problem.rows = 5; },
          {"query_layout is ragged"},
          BLASST_UNSUPPORTED},
         {"QueryLengths",
          dense,
          [](P& p) { p.problem.query_lengths = p.problem.kv.lengths; },
          {"query_lengths is set"},
          BLASST_UNSUPPORTED},
         {"Scores",
          dense,
          [](P& p) { p.decision.scores = BLASST_SCORES_INT8; },
          {"cuda", "scores is int8 (1)", "exact scores (0) only"},
          BLASST_UNSUPPORTED},
         {"Places",
          dense,
          [](P& p) { p.decision.test.places = 2; },
          {"test.places is 2"},
          BLASST_UNSUPPORTED},
         {"TileMaxima",
          dense,
          [](P& p) { p.report.tile_maxima = static_cast<float*>(device(0x80000000)); },
          {"report.tile_maxima"},
          BLASST_UNSUPPORTED},
         {"Bands",
          dense,
          [](P& p) { p.problem.mask.bands = array<int64_t>(0x80000000); },
          {"bands"},
          BLASST_UNSUPPORTED}})),
    name_of);

TEST(DecodePlan, PassesOnWhatItIsGiven) {
  P p = paged();
  p.problem.mask.window_left = 100;
  p.problem.softcap = 30;
  const Launch l = plan_launch(p);
  EXPECT_EQ(l.qk_dim, kDim);
  EXPECT_EQ(l.params.keys.length, 15 * 64);
  EXPECT_EQ(l.params.distances.least, 0);
  EXPECT_EQ(l.params.distances.most, 100);
  EXPECT_EQ(l.params.softcap, 30);
  EXPECT_FLOAT_EQ(l.params.scale, 0.08838835f);
  EXPECT_EQ(l.k.outer, 40);
  EXPECT_EQ(l.k.tokens, 64);
  EXPECT_EQ(l.q.tokens, 2);
  EXPECT_EQ(l.params.keys.starts, nullptr);
  p = dense();
  p.problem.kv.starts = p.problem.kv.lengths;
  EXPECT_EQ(plan_launch(p).params.keys.starts, p.problem.kv.starts);
}

TEST(DecodePlan, TileShapeIsOfTheRequestAlone) {
  P p = dense();
  const TileShape shape = plan(p).shape;
  EXPECT_EQ(shape.query_rows, 8);
  EXPECT_EQ(shape.keys, 64);
  EXPECT_EQ(shape.split_tiles, 8);
  EXPECT_EQ(shape.most_splits, 132);
  p.problem.batch = 1;
  p.problem.kv.key_length = 500;
  EXPECT_EQ(plan(p).shape.most_splits, shape.most_splits);
}

}  // namespace
}  // namespace blasst::cuda::decode
