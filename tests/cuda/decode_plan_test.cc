// What the host checks before a decode call reaches the GPU, and what it passes on. No GPU needed.
#include <gtest/gtest.h>

#include "cuda/sm90/decode/plan.h"
#include "plan_cases.h"

namespace blasst::cuda::decode {
namespace {

using P = DecodeParams;

P dense() {
  P p = dense_call<P>(2);
  p.kv.lengths = array<int32_t>(0x70000000);
  p.workspace_bytes = workspace_bytes(p);
  return p;
}

P paged() {
  P p = paged_call(dense());
  p.workspace_bytes = workspace_bytes(p);
  return p;
}

class DecodePlanRejects : public testing::TestWithParam<Bad<P>> {};

TEST_P(DecodePlanRejects, AndSaysWhy) { expect_refusal(GetParam(), plan); }

INSTANTIATE_TEST_SUITE_P(
    , DecodePlanRejects,
    testing::ValuesIn(refused<P>(
        dense, paged,
        {{"TooManyRows",
          dense,
          [](P& p) { p.heads = 32, p.query_length = 5; },
          {"80 rows", "64"},
          BLASST_UNSUPPORTED},
         {"TooManyPositions", dense, [](P& p) { p.query_length = 17; }, {"17", "1 to 16"}},
         {"Places",
          dense,
          [](P& p) { p.test.places = 2; },
          {"test.places is 2"},
          BLASST_UNSUPPORTED},
         {"TileMaxima",
          dense,
          [](P& p) { p.report.tile_maxima = static_cast<float*>(device(0x80000000)); },
          {"report.tile_maxima"},
          BLASST_UNSUPPORTED},
         {"Bands",
          dense,
          [](P& p) { p.mask.bands = array<int64_t>(0x80000000); },
          {"bands"},
          BLASST_UNSUPPORTED}})),
    name_of<P>);

TEST(DecodePlan, PassesOnWhatItIsGiven) {
  DecodeParams p = paged();
  p.mask.window_left = 100;
  p.softcap = 30;
  const Launch l = plan(p);
  EXPECT_EQ(l.dim, kDim);
  EXPECT_EQ(l.params.key_length, 15 * 64);
  EXPECT_EQ(l.params.least_distance, 0);
  EXPECT_EQ(l.params.most_distance, 100);
  EXPECT_EQ(l.params.softcap, 30);
  EXPECT_FLOAT_EQ(l.params.scale, 0.08838835f);
  EXPECT_EQ(l.k.outer, 40);
  EXPECT_EQ(l.k.tokens, 64);
  EXPECT_EQ(l.q.tokens, 2);
  EXPECT_EQ(l.params.starts, nullptr);
  p = dense();
  p.kv.starts = p.kv.lengths;
  EXPECT_EQ(plan(p).params.starts, p.kv.starts);
}

TEST(DecodePlan, TileShapeIsOfTheRequestAlone) {
  DecodeParams p = dense();
  const TileShape shape = tile_shape(p);
  EXPECT_EQ(shape.query_rows, 8);
  EXPECT_EQ(shape.keys, 64);
  EXPECT_EQ(shape.split_tiles, 8);
  EXPECT_EQ(shape.most_splits, 132);
  p.batch = 1;
  p.kv.key_length = 500;
  EXPECT_EQ(tile_shape(p).most_splits, shape.most_splits);
}

}  // namespace
}  // namespace blasst::cuda::decode
