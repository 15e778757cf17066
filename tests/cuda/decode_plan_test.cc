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

// Over latents, whose values lie in the keys.
P latents() {
  P p = paged();
  blasst_problem& a = p.problem;
  a.kv_heads = 1;
  a.head_dim = 576, a.value_dim = 512;
  const auto view = [&](View& v, int64_t outer, int64_t tokens, int64_t heads, int64_t dim) {
    v.stride_head = dim, v.stride_token = heads * dim, v.stride_request = tokens * heads * dim;
    v.elements = outer * v.stride_request;
  };
  view(a.q, 3, 2, kHeads, 576);
  view(a.out, 3, 2, kHeads, 512);
  view(a.kv.k, 40, 64, 1, 576);
  a.kv.v = a.kv.k;
  p.execution.workspace_bytes = plan(p).workspace_bytes;
  return p;
}

// Requests of 5 positions in all, 2 at most.
P ragged() {
  P p = paged();
  p.problem.query_layout = BLASST_LAYOUT_RAGGED;
  p.problem.rows = 5;
  p.problem.cu_seqlens_q = array<int32_t>(0x80000000);
  p.problem.q.elements = p.problem.out.elements = 5 * kHeads * kDim;
  return p;
}

P in_8_bits() {
  P p = dense();
  p.problem.kv.k.dtype = p.problem.kv.v.dtype = BLASST_FLOAT8_E4M3;
  p.problem.kv.k.elements *= 2, p.problem.kv.v.elements *= 2;  // of the same buffers
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
         {"LatentsOfTwoKvHeads",
          latents,
          [](P& p) { p.problem.kv_heads = 2; },
          {"kv_heads is 2", "latents"},
          BLASST_UNSUPPORTED},
         {"ValuesElsewhere",
          latents,
          [](P& p) { p.problem.kv.v.data = device(0x40000000); },
          {"v is not k's first 512 elements", "0x40000000"},
          BLASST_UNSUPPORTED},
         {"ValuesOfAnotherStride",
          latents,
          [](P& p) { p.problem.kv.v.stride_token = 512; },
          {"v is not k's first 512 elements", "512 and 576"},
          BLASST_UNSUPPORTED},
         {"RaggedWithoutStarts",
          ragged,
          [](P& p) { p.problem.cu_seqlens_q = nullptr; },
          {"cu_seqlens_q is null"}},
         {"MoreRowsThanRequestsHave",
          ragged,
          [](P& p) { p.problem.rows = 7; },
          {"rows is 7, more than batch 3 times query_length 2"}},
         {"RaggedShort",
          ragged,
          [](P& p) { p.problem.q.elements -= 1; },
          {"q reaches element", "[1, 5,"}},
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
         {"KeysIn8BitsAlone",
          dense,
          [](P& p) { p.problem.kv.k.dtype = BLASST_FLOAT8_E4M3; },
          {"cuda", "k is float8_e4m3 and v bfloat16; decode does both in one type"},
          BLASST_UNSUPPORTED},
         {"TwoTypesOf8Bits",
          in_8_bits,
          [](P& p) { p.problem.kv.v.dtype = BLASST_INT8; },
          {"cuda", "k is float8_e4m3 and v int8; decode does both in one type"},
          BLASST_UNSUPPORTED},
         {"CacheDims",
          in_8_bits,
          [](P& p) { p.problem.head_dim = 192; },
          {"cuda", "k is float8_e4m3 with head_dim 192 and value_dim 128", "64, 128 and 256"},
          BLASST_UNSUPPORTED},
         {"Int8KeysOfAnotherDim",
          in_8_bits,
          [](P& p) {
            p.problem.head_dim = p.problem.value_dim = 64;
            p.problem.kv.k.dtype = BLASST_INT8, p.problem.kv.v.dtype = BLASST_BFLOAT16;
          },
          {"cuda", "k is int8 and v bfloat16 with head_dim 64", "128"},
          BLASST_UNSUPPORTED},
         {"CacheStride",
          in_8_bits,
          [](P& p) { p.problem.kv.v.stride_token += 8; },
          {"cuda", "v.stride_token is 264", "a multiple of 16 elements, 16 bytes"},
          BLASST_UNSUPPORTED},
         {"ScalesOfKeysIn16Bits",
          dense,
          [](P& p) { p.problem.k_scales.values = array<float>(0x80000000); },
          {"k_scales.values is set, but k is bfloat16"}},
         {"TooManySplits",
          dense,
          [](P& p) {
            p.problem.batch = 1 << 20;
            p.problem.heads = p.problem.kv_heads = 2048;
          },
          {"cuda: decode of batch 1048576 has", "splits; at most"},
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

TEST(DecodePlan, RaggedQueriesAreOneTensorAndDecidedOnAsTheMostPositions) {
  const P p = ragged();
  const Launch l = plan_launch(p);
  EXPECT_EQ(l.params.cu_seqlens_q, p.problem.cu_seqlens_q);
  EXPECT_EQ(l.params.rows, 5);
  EXPECT_EQ(l.params.query_length, 2);
  EXPECT_EQ(l.q.outer, 1);
  EXPECT_EQ(l.q.tokens, 5);
  EXPECT_EQ(plan(p).shape.query_rows, plan(paged()).shape.query_rows);
  EXPECT_EQ(plan(p).workspace_bytes, plan(paged()).workspace_bytes);
  EXPECT_EQ(plan_launch(paged()).params.cu_seqlens_q, nullptr);
  EXPECT_EQ(plan_launch(paged()).params.rows, 6);
}

TEST(DecodePlan, HeadsOverLatentsDecideInPartsOf64Rows) {
  P p = latents();
  blasst_plan found = plan(p);
  EXPECT_EQ(found.shape.query_rows, kHeads * 2);
  EXPECT_EQ(found.tile_heads, 1);
  EXPECT_EQ(found.shape.most_splits, 132);
  for (const auto& [heads, parts] : {std::pair<int64_t, int64_t>{32, 1}, {96, 3}, {128, 4}}) {
    p.problem.heads = heads;
    found = plan(p);
    EXPECT_EQ(found.shape.query_rows, heads * 2 / parts);
    EXPECT_EQ(found.tile_heads, parts);
    EXPECT_EQ(found.shape.most_splits, (132 + parts - 1) / parts);
  }
  EXPECT_EQ(plan_launch(latents()).params.kv_heads, 1);
}

TEST(DecodePlan, KeysAndValuesMayBeIn8Bits) {
  P p = in_8_bits();
  p.problem.k_scales = {.values = array<float>(0x80000000), .stride_request = 2, .stride_head = 1};
  const Launch l = plan_launch(p);
  EXPECT_EQ(l.element, Element::kBFloat16);
  EXPECT_EQ(l.cache, Cache::kFloat8);
  EXPECT_EQ(l.params.k_scales.values, p.problem.k_scales.values);
  EXPECT_EQ(l.params.k_scales.stride_request, 2);
  EXPECT_EQ(l.params.k_scales.stride_head, 1);
  EXPECT_EQ(l.params.v_scales.values, nullptr);
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
