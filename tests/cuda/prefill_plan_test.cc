// What the host checks before a prefill call reaches the GPU, and what it passes on. No GPU needed.
#include <gtest/gtest.h>

#include "cuda/sm90/prefill/plan.h"
#include "plan_cases.h"

namespace blasst::cuda::prefill {
namespace {

using P = PrefillParams;

P dense() {
  P p = dense_call<P>(kRoom);
  p.workspace_bytes = 16;
  return p;
}

P ragged() {
  P p = dense();
  p.cu_seqlens_q = p.kv.cu_seqlens = array<int32_t>(0x60000000);
  p.rows = 2000;
  p.workspace_bytes = 16 + 2 * 4 * 4;  // where the blocks and tiles of three requests begin
  return p;
}

P paged() { return paged_call(dense()); }

class PrefillPlanRejects : public testing::TestWithParam<Bad<P>> {};

TEST_P(PrefillPlanRejects, AndSaysWhy) { expect_refusal(GetParam(), plan); }

INSTANTIATE_TEST_SUITE_P(
    , PrefillPlanRejects,
    testing::ValuesIn(refused<P>(
        dense, paged,
        {{"RowsOfDense", dense, [](P& p) { p.rows = 7; }, {"rows is 7"}},
         {"RowsOfRagged", ragged, [](P& p) { p.rows = 3001; }, {"rows is 3001", "query_length"}},
         {"RaggedQueryLengths",
          ragged,
          [](P& p) { p.query_lengths = p.cu_seqlens_q; },
          {"query_lengths", "dense queries"}},
         {"MaximaStride",
          dense,
          [](P& p) {
            p.report.tile_maxima = static_cast<float*>(device(0x80000000));
            p.report.tile_maxima_stride = 1;
          },
          {"report.tile_maxima_stride is 1"}},
         {"TwoLayouts", ragged, [](P& p) { p.kv.lengths = p.kv.cu_seqlens; }, {"one layout"}}})),
    name_of<P>);

TEST(PrefillPlan, ChoosesTheKernelByWhatIsAsked) {
  P p = dense();
  EXPECT_EQ(plan(p).variant, Variant::kDense);
  float* buffer = static_cast<float*>(device(0x60000000));
  p.report.lse = buffer;
  EXPECT_EQ(plan(p).variant, Variant::kDense);
  p.test = {.kind = BLASST_TEST_RELATIVE, .values = buffer};
  EXPECT_EQ(plan(p).variant, Variant::kSparse);
  p.report.dropped_mass_bound = buffer;
  EXPECT_EQ(plan(p).variant, Variant::kReport);
  p = dense();
  p.report.tiles_visitable = static_cast<int64_t*>(device(0x60000000));
  EXPECT_EQ(plan(p).variant, Variant::kSparse);
}

TEST(PrefillPlan, PassesLayoutsOn) {
  const Launch d = plan(dense());
  EXPECT_EQ(d.params.rows, 3 * kRoom);
  EXPECT_EQ(d.k.outer, 3);
  EXPECT_EQ(d.params.least_distance, 0);
  EXPECT_EQ(d.params.most_distance, kUnlimited);
  const Launch r = plan(ragged());
  EXPECT_EQ(r.q.outer, 1);
  EXPECT_EQ(r.q.tokens, 2000);
  EXPECT_EQ(r.k.tokens, 3 * kRoom);  // what the buffer holds
  const Launch g = plan(paged());
  EXPECT_EQ(g.params.key_length, 15 * 64);
  EXPECT_EQ(g.k.outer, 40);
  EXPECT_EQ(g.k.tokens, 64);
}

TEST(PrefillPlan, WorkspaceGrowsWhereRequestsDiffer) {
  EXPECT_EQ(workspace_bytes(dense()), 16u);
  EXPECT_EQ(workspace_bytes(ragged()), 48u);
  P p = dense();
  p.query_lengths = array<int32_t>(0x60000000);
  EXPECT_EQ(workspace_bytes(p), 48u);
  EXPECT_THROW(plan(p), Error);
  p.query_lengths = nullptr, p.kv.starts = array<int32_t>(0x60000000);
  EXPECT_EQ(workspace_bytes(p), 48u);
}

TEST(PrefillPlan, RaggedNeedsNoLongestRequest) {
  P p = ragged();
  p.query_length = p.kv.key_length = 0;
  const Launch l = plan(p);
  EXPECT_EQ(l.params.query_length, 2000);
  EXPECT_EQ(l.params.key_length, 3 * kRoom);
  p.kv.k.stride_token = p.kv.v.stride_token = 0;  // any number of them
  EXPECT_EQ(plan(p).params.key_length, kUnlimited - 1);
}

TEST(PrefillPlan, TileShapeDependsOnTheDimensionAlone) {
  P p = dense();
  EXPECT_EQ(tile_shape(p).query_rows, 64);
  EXPECT_EQ(tile_shape(p).keys, 128);
  p.head_dim = p.value_dim = 256;
  p.q.elements = p.out.elements = p.kv.k.elements = p.kv.v.elements = int64_t{1} << 30;
  p.q.stride_head = p.out.stride_head = p.kv.k.stride_head = p.kv.v.stride_head = 256;
  p.q.stride_token = p.out.stride_token = kHeads * 256;
  p.kv.k.stride_token = p.kv.v.stride_token = kKvHeads * 256;
  p.q.stride_request = p.out.stride_request = kRoom * kHeads * 256;
  p.q.data = device(uintptr_t{1} << 40);
  p.out.data = device(uintptr_t{2} << 40);
  p.kv.k.data = device(uintptr_t{3} << 40);
  p.kv.v.data = device(uintptr_t{4} << 40);
  EXPECT_EQ(tile_shape(p).keys, 64);
}

}  // namespace
}  // namespace blasst::cuda::prefill
