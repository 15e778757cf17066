// What the host checks before a prefill call reaches the GPU, and what it passes on. No GPU needed.
#include <gtest/gtest.h>

#include <cstddef>
#include <string>

#include "cuda/backend.h"
#include "cuda/core/checks.h"
#include "cuda/core/prefill/widen.h"
#include "cuda/sm90/prefill/plan.h"
#include "cuda/sm90/prefill/quantize.h"
#include "plan_cases.h"

namespace blasst::cuda::prefill {
namespace {

using P = AttentionParams;

Plan plan_of(const P& p) { return plan(p); }

P dense() { return dense_call_of<plan_of, kRoom>(); }

P ragged() {
  P p = dense();
  p.problem.query_layout = p.problem.kv.layout = BLASST_LAYOUT_RAGGED;
  p.problem.cu_seqlens_q = p.problem.kv.cu_seqlens = array<int32_t>(0x60000000);
  p.problem.rows = 2000;
  p.problem.kv.tokens = 1500;
  return p;
}

P paged() { return paged_call_of<plan_of, kRoom>(); }

class PrefillPlanRejects : public testing::TestWithParam<Bad> {};

TEST_P(PrefillPlanRejects, AndSaysWhy) { expect_refusal(GetParam(), plan_launch); }

INSTANTIATE_TEST_SUITE_P(
    , PrefillPlanRejects,
    testing::ValuesIn(refused(
        dense, paged,
        {{"KeysIn8Bits",
          dense,
          [](P& p) { p.problem.kv.k.dtype = BLASST_FLOAT8_E4M3; },
          {"cuda", "q is bfloat16 and k float8_e4m3; prefill does tensors of one type"},
          BLASST_UNSUPPORTED},
         {"ValuesIn8Bits",
          dense,
          [](P& p) { p.problem.kv.v.dtype = BLASST_INT8; },
          {"cuda", "q is bfloat16 and v int8; prefill does tensors of one type"},
          BLASST_UNSUPPORTED},
         {"RowsOfDense", dense, [](P& p) { p.problem.rows = 7; }, {"rows is set", "ragged"}},
         {"RowsOfRagged",
          ragged,
          [](P& p) { p.problem.rows = 3001; },
          {"rows is 3001", "query_length"}},
         {"RaggedQueryLengths",
          ragged,
          [](P& p) { p.problem.query_lengths = p.problem.cu_seqlens_q; },
          {"query_lengths is set", "dense"}},
         {"Int8OfTwoSizes",
          dense,
          [](P& p) {
            p.problem.head_dim = 192;
            p.decision.scores = BLASST_SCORES_INT8;
          },
          {"scores in int8", "head_dim 192 and value_dim 128"},
          BLASST_UNSUPPORTED},
         {"MaximaStride",
          dense,
          [](P& p) {
            p.report.tile_maxima = static_cast<float*>(device(0x80000000));
            p.report.tile_maxima_stride = 1;
          },
          {"report.tile_maxima_stride is 1"}},
         {"TwoLayouts",
          ragged,
          [](P& p) { p.problem.kv.lengths = p.problem.kv.cu_seqlens; },
          {"kv.lengths is set", "dense (0) or paged (2)"}}})),
    name_of);

TEST(PrefillPlan, ChoosesTheKernelByWhatIsAsked) {
  P p = dense();
  EXPECT_EQ(plan_launch(p).variant, Variant::kDense);
  float* buffer = static_cast<float*>(device(0x60000000));
  p.report.lse = buffer;
  EXPECT_EQ(plan_launch(p).variant, Variant::kDense);
  p.decision.test = {.kind = BLASST_TEST_RELATIVE, .values = buffer};
  EXPECT_EQ(plan_launch(p).variant, Variant::kSparse);
  p.report.tile_bits = static_cast<uint32_t*>(device(0x60000000));
  EXPECT_EQ(plan_launch(p).variant, Variant::kSparse) << "what a backward pass needs";
  p.report.dropped_mass_bound = buffer;
  EXPECT_EQ(plan_launch(p).variant, Variant::kReport);
  p = dense();
  p.report.tiles_visitable = static_cast<int64_t*>(device(0x60000000));
  EXPECT_EQ(plan_launch(p).variant, Variant::kSparse);
}

TEST(PrefillPlan, PassesLayoutsOn) {
  const Launch d = plan_launch(dense());
  EXPECT_EQ(d.params.rows, 3 * kRoom);
  EXPECT_EQ(d.k.outer, 3);
  EXPECT_EQ(d.params.distances.least, 0);
  EXPECT_EQ(d.params.distances.most, kUnlimited);
  const Launch r = plan_launch(ragged());
  EXPECT_EQ(r.q.outer, 1);
  EXPECT_EQ(r.q.tokens, 2000);
  EXPECT_EQ(r.k.tokens, 1500);
  EXPECT_EQ(r.params.keys.length, kRoom);
  EXPECT_EQ(r.params.report.query_tiles, (2000 + 3 * 63) / 64);
  const Launch g = plan_launch(paged());
  EXPECT_EQ(g.params.keys.length, 15 * 64);
  EXPECT_EQ(g.k.outer, 40);
  EXPECT_EQ(g.k.tokens, 64);
}

TEST(PrefillPlan, RaggedNeedsNoLongestRequest) {
  P p = ragged();
  p.problem.query_length = p.problem.kv.key_length = 0;
  const Launch l = plan_launch(p);
  EXPECT_EQ(l.params.query_length, 2000);
  EXPECT_EQ(l.params.keys.length, 1500);
}

TEST(PrefillPlan, NeedsScalarsAlone) {
  P p{.problem = {.batch = 3,
                  .heads = kHeads,
                  .kv_heads = kKvHeads,
                  .head_dim = kDim,
                  .value_dim = kDim,
                  .query_length = 100,
                  .kv = {.key_length = 5000}}};
  for (View* view : {&p.problem.q, &p.problem.kv.k, &p.problem.kv.v, &p.problem.out})
    view->dtype = BLASST_FLOAT16;
  Plan tiles = plan(p);
  EXPECT_EQ(tiles.backend, BLASST_BACKEND_CUDA_SM90);
  EXPECT_EQ(tiles.shape.query_rows, 64);
  EXPECT_EQ(tiles.shape.keys, 128);
  EXPECT_EQ(tiles.tile_heads, kHeads);
  EXPECT_EQ(tiles.query_tiles, 6);
  EXPECT_EQ(tiles.key_tiles, 40);
  EXPECT_EQ(tiles.tile_words, 2);
  EXPECT_EQ(tiles.workspace_bytes, 48u);
  p.problem.head_dim = p.problem.value_dim = 256;
  EXPECT_EQ(plan(p).shape.keys, 64);
  p.problem.head_dim = 192, p.problem.value_dim = 128;
  EXPECT_EQ(plan(p).shape.keys, 128);
}

TEST(PrefillPlan, Int8ScoresNeedRoomForTheKeysBytes) {
  P p = dense();
  const std::size_t exact = plan(p).workspace_bytes;
  p.decision.scores = BLASST_SCORES_INT8;
  const std::size_t needed = plan(p).workspace_bytes;
  // Three requests of 8 tiles of 128 keys; a byte an element, and its share of the rest.
  const std::size_t bytes = std::size_t{3} * 8 * 128 * kKvHeads * kDim;
  EXPECT_GT(needed, exact + bytes);
  EXPECT_LT(needed, exact + bytes + bytes / 8);
  EXPECT_THROW(plan_launch(p), Error);  // the workspace is that of exact scores
  p.execution.workspace_bytes = needed;
  const Launch l = plan_launch(p);
  EXPECT_EQ(l.scores, Scores::kInt8);
  EXPECT_EQ(l.params.quantized.tiles, 3 * 8);
  EXPECT_EQ(l.params.score_to_log2, 1);
  EXPECT_FALSE(l.params.quantized.level);
  float* buffer = static_cast<float*>(device(0x60000000));
  p.report.lse = buffer;
  EXPECT_TRUE(plan_launch(p).params.quantized.level);
  p.execution.workspace = static_cast<std::byte*>(p.execution.workspace) + 64;
  EXPECT_THROW(plan_launch(p), Error);
}

P with_int8_keys(P p) {
  p.problem.kv.k.dtype = BLASST_INT8;
  p.problem.kv.k.elements *= 2;  // of the same buffer
  p.problem.k_scales = {.values = array<float>(0x80000000), .stride_head = 1};
  p.decision.scores = BLASST_SCORES_INT8;
  return p;
}

TEST(PrefillPlan, Int8ScoresTakeInt8KeysAsTheyAre) {
  for (const P& given : {dense(), ragged(), paged()}) {
    P p = with_int8_keys(given);
    EXPECT_FALSE(needs_widening(p));
    P rounded = given;
    rounded.decision.scores = BLASST_SCORES_INT8;
    const std::size_t needed = sm90_backend().plan(p, problem::Phase::kPrefill).workspace_bytes;
    EXPECT_LT(needed, plan(rounded).workspace_bytes);  // which has means and sums
    p.execution.workspace_bytes = needed;
    float* buffer = static_cast<float*>(device(0x60000000));
    p.report.lse = buffer;
    const Launch l = plan_launch(p);
    EXPECT_TRUE(l.params.quantized.as_stored);
    EXPECT_FALSE(l.params.quantized.level);
    EXPECT_EQ(l.params.quantized.means, nullptr);
    EXPECT_EQ(l.k.data, p.problem.kv.k.data);
    EXPECT_EQ(l.k_scales.values, p.problem.k_scales.values);
    EXPECT_EQ(l.params.keys.page_table, p.problem.kv.page_table);
  }
  P exact = with_int8_keys(dense());
  exact.decision.scores = BLASST_SCORES_EXACT;
  EXPECT_TRUE(needs_widening(exact));
  EXPECT_THROW(plan(exact), Error);  // it takes no int8 but under these scores
}

P in_8_bits(P p) {
  for (View* view : {&p.problem.kv.k, &p.problem.kv.v}) {
    view->dtype = BLASST_INT8;
    view->elements *= 2;  // of the same buffer
  }
  p.problem.k_scales = {.values = array<float>(0x80000000), .stride_head = 1};
  return p;
}

TEST(Widening, IsTheSameCallOverTheWorkspace) {
  for (const P& given : {dense(), ragged(), paged()}) {
    EXPECT_FALSE(needs_widening(given));
    const P p = in_8_bits(given);
    EXPECT_TRUE(needs_widening(p));
    EXPECT_NO_THROW(check_widening(kCudaSm90, p));
    const Widening w = plan_widening(kCudaSm90, p);
    const KeysValues &from = p.problem.kv, &to = w.params.problem.kv;
    const int64_t tokens = from.layout == BLASST_LAYOUT_RAGGED  ? 1500
                           : from.layout == BLASST_LAYOUT_PAGED ? 3 * 15 * 64
                                                                : 3 * kRoom;
    const auto bytes = static_cast<std::size_t>(2 * tokens * kKvHeads * kDim);
    EXPECT_GE(w.bytes, 2 * bytes);
    EXPECT_LT(w.bytes, 2 * bytes + 512);
    EXPECT_EQ(w.bytes % 256, 0u);
    EXPECT_EQ(to.k.dtype, BLASST_BFLOAT16);
    EXPECT_EQ(to.v.dtype, BLASST_BFLOAT16);
    EXPECT_EQ(w.params.problem.k_scales.values, nullptr);
    EXPECT_EQ(w.k.scales.values, p.problem.k_scales.values);
    EXPECT_EQ(w.k.to, p.execution.workspace);
    EXPECT_EQ(w.params.execution.workspace,
              static_cast<std::byte*>(p.execution.workspace) + w.bytes);
    EXPECT_EQ(to.layout, from.layout == BLASST_LAYOUT_PAGED ? BLASST_LAYOUT_DENSE : from.layout);
    P call = w.params;
    call.execution.workspace_bytes = plan(call).workspace_bytes;
    const Launch l = plan_launch(call);
    EXPECT_EQ(l.k.data, w.k.to);
    EXPECT_EQ(l.v.data, w.v.to);
    EXPECT_EQ(l.k.outer * l.k.tokens, tokens);
    EXPECT_EQ(l.params.keys.page_table, nullptr);
    EXPECT_EQ(l.params.keys.lengths, from.lengths);
    const Plan all = sm90_backend().plan(p, problem::Phase::kPrefill);
    EXPECT_EQ(all.workspace_bytes, w.bytes + plan(call).workspace_bytes);
  }
}

TEST(Widening, CopiesOnlyWhatMustBe) {
  for (const P& given : {dense(), ragged(), paged()}) {
    const bool paged = given.problem.kv.layout == BLASST_LAYOUT_PAGED;
    // 16-bit values stay beside keys that are widened, but for pages.
    P keys = with_int8_keys(given);
    keys.decision.scores = BLASST_SCORES_EXACT;
    const Widening wide = plan_widening(kCudaSm90, keys);
    EXPECT_NE(wide.k.to, nullptr);
    EXPECT_EQ(wide.v.to != nullptr, paged);
    // So do keys whose bytes are taken, beside values that are widened; with their scales.
    P both = in_8_bits(given);
    both.decision.scores = BLASST_SCORES_INT8;
    const Widening w = plan_widening(kCudaSm90, both);
    const KeysValues &from = both.problem.kv, &to = w.params.problem.kv;
    EXPECT_TRUE(needs_widening(both));
    EXPECT_FALSE(needs_widening(w.params));
    EXPECT_EQ(w.k.to != nullptr, paged);
    EXPECT_NE(w.v.to, nullptr);
    EXPECT_EQ(to.k.dtype, BLASST_INT8);
    EXPECT_EQ(to.v.dtype, BLASST_BFLOAT16);
    EXPECT_EQ(to.k.data == from.k.data, !paged);
    EXPECT_EQ(w.params.problem.k_scales.values, both.problem.k_scales.values);
    EXPECT_EQ(w.params.problem.v_scales.values, nullptr);
    P call = w.params;
    call.execution.workspace_bytes = plan(call).workspace_bytes;
    EXPECT_TRUE(plan_launch(call).params.quantized.as_stored);
  }
}

TEST(Widening, RefusesWhatItCannotRead) {
  const auto refusal = [](const auto& bend) {
    P p = in_8_bits(dense());
    bend(p);
    try {
      plan_widening(kCudaSm90, p);
      check_widening(kCudaSm90, p);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(refusal([](P&) {}), "");
  EXPECT_NE(refusal([](P& p) { p.problem.kv.k.stride_token += 8; }).find("k.stride_token is 264"),
            std::string::npos);
  EXPECT_NE(refusal([](P& p) { p.problem.kv.v.dtype = BLASST_FLOAT16; })
                .find("q is bfloat16 and v float16; prefill does tensors of one type, and keys and "
                      "values in int8 and float8_e4m3"),
            std::string::npos);
  EXPECT_NE(refusal([](P& p) { p.problem.kv.k.elements = 5; }).find("k.elements is 5"),
            std::string::npos);
  EXPECT_NE(refusal([](P& p) { p.problem.batch = 70000; }).find("batch is 70000"),
            std::string::npos);
}

TEST(QuantizedLayout, FollowsTheRequests) {
  const QuantizedLayout dense = quantized_layout(3, 2, 1000, -1, 64, 128, false);
  EXPECT_EQ(dense.tiles, 3 * 8);
  // Ragged: a request may begin in the middle of what would be a tile of all tokens.
  const QuantizedLayout ragged = quantized_layout(3, 2, 1000, 1500, 64, 128, false);
  EXPECT_EQ(ragged.tiles, 1500 / 128 + 3);
  for (const QuantizedLayout& l : {dense, ragged}) {
    EXPECT_EQ(l.units, static_cast<std::size_t>(l.tiles) * 2 * 128 * 64);
    EXPECT_LT(l.units, l.broken);
    EXPECT_LT(l.broken, l.means);
    EXPECT_LT(l.means, l.sums);
    EXPECT_LT(l.sums, l.bytes);
    for (const std::size_t offset : {l.units, l.broken, l.means, l.sums})
      EXPECT_EQ(offset % 16, 0u);
  }
  EXPECT_EQ(quantized_layout(3, 2, 0, -1, 64, 128, false).bytes, 3u * 2 * 64 * sizeof(float));
  const QuantizedLayout stored = quantized_layout(3, 2, 1000, -1, 64, 128, true);
  EXPECT_EQ(stored.bytes, dense.means);  // neither means nor sums
}

}  // namespace
}  // namespace blasst::cuda::prefill
