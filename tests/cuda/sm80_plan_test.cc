// What the host checks before a call reaches the portable kernels. No GPU needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

#include "cuda/backend.h"
#include "cuda/sm80/decode/launch.h"
#include "cuda/sm80/decode/plan.h"
#include "cuda/sm80/decode/shape.h"
#include "cuda/sm80/prefill/plan.h"
#include "cuda/sm90/decode/plan.h"
#include "plan_cases.h"
#include "testing/case.h"
#include "testing/device.h"

namespace blasst::cuda {
namespace {

using P = AttentionParams;

Plan prefill_plan(const P& p) { return prefill::sm80::plan(p); }
Plan decode_plan(const P& p) { return decode::sm80::plan(p); }

constexpr auto kPrefill = dense_call_of<prefill_plan, kRoom>;
constexpr auto kDecode = dense_call_of<decode_plan, 2>;

class Sm80PrefillRejects : public testing::TestWithParam<Bad> {};
class Sm80DecodeRejects : public testing::TestWithParam<Bad> {};

TEST_P(Sm80PrefillRejects, AndSaysWhy) { expect_refusal(GetParam(), prefill::sm80::plan_launch); }
TEST_P(Sm80DecodeRejects, AndSaysWhy) { expect_refusal(GetParam(), decode::sm80::plan_launch); }

INSTANTIATE_TEST_SUITE_P(
    , Sm80PrefillRejects,
    testing::ValuesIn(refused(kPrefill, paged_call_of<prefill_plan, kRoom>,
                              {{"Int8",
                                kPrefill,
                                [](P& p) { p.decision.scores = BLASST_SCORES_INT8; },
                                {"cuda-sm80: scores is int8", "prefill has exact scores"},
                                BLASST_UNSUPPORTED},
                               {"Int8OfInt8Keys",
                                kPrefill,
                                [](P& p) {
                                  p.decision.scores = BLASST_SCORES_INT8;
                                  p.problem.kv.k.dtype = BLASST_INT8;
                                  p.problem.kv.k.elements *= 2;
                                },
                                {"cuda-sm80: scores is int8", "prefill has exact scores"},
                                BLASST_UNSUPPORTED}})),
    name_of);

INSTANTIATE_TEST_SUITE_P(
    , Sm80DecodeRejects,
    testing::ValuesIn(
        refused(kDecode, paged_call_of<decode_plan, 2>,
                {{"TooManyRows",
                  kDecode,
                  [](P& p) { p.problem.heads = 32, p.problem.query_length = 5; },
                  {"cuda-sm80: decode of 16 query heads", "80 rows", "64 rows at most"},
                  BLASST_UNSUPPORTED},
                 {"Int8",
                  kDecode,
                  [](P& p) { p.decision.scores = BLASST_SCORES_INT8; },
                  {"cuda-sm80: scores is int8", "decode has exact scores"},
                  BLASST_UNSUPPORTED},
                 {"KeysIn8Bits",
                  kDecode,
                  [](P& p) {
                    p.problem.kv.k.dtype = p.problem.kv.v.dtype = BLASST_FLOAT8_E4M3;
                    p.problem.kv.k.elements *= 2, p.problem.kv.v.elements *= 2;
                  },
                  {"cuda-sm80: q is bfloat16 and k float8_e4m3; decode does tensors of one type"},
                  BLASST_UNSUPPORTED},
                 {"Latents",
                  kDecode,
                  [](P& p) { p.problem.head_dim = 576, p.problem.value_dim = 512; },
                  {"cuda-sm80: head_dim is 576 and value_dim 512", "96/64", "192/128"},
                  BLASST_UNSUPPORTED},
                 {"RaggedWithoutStarts",
                  kDecode,
                  [](P& p) { p.problem.query_layout = BLASST_LAYOUT_RAGGED, p.problem.rows = 5; },
                  {"cu_seqlens_q is null"}},
                 {"QueryLengths",
                  kDecode,
                  [](P& p) { p.problem.query_lengths = array<int32_t>(0x70000000); },
                  {"cuda-sm80: query_lengths is set"},
                  BLASST_UNSUPPORTED},
                 {"TooManySplits",
                  kDecode,
                  [](P& p) {
                    p.problem.batch = 1 << 20;
                    p.problem.heads = p.problem.kv_heads = 2048;
                  },
                  {"cuda: decode of batch 1048576 has", "splits; at most"},
                  BLASST_UNSUPPORTED},
                 {"Places",
                  kDecode,
                  [](P& p) { p.decision.test.places = 2; },
                  {"cuda-sm80: test.places is 2"},
                  BLASST_UNSUPPORTED},
                 {"TileMaxima",
                  kDecode,
                  [](P& p) { p.report.tile_maxima = static_cast<float*>(device(0x80000000)); },
                  {"cuda-sm80: report.tile_maxima is set"},
                  BLASST_UNSUPPORTED},
                 {"Bands",
                  kDecode,
                  [](P& p) { p.problem.mask.bands = array<int64_t>(0x80000000); },
                  {"cuda-sm80: mask.bands is set"},
                  BLASST_UNSUPPORTED}})),
    name_of);

// One calibration serves both.
TEST(Sm80Plan, DecodesOnTheTilesOfTheHopperKernel) {
  const P p = kDecode();
  const Plan own = decode_plan(p), hopper = decode::plan(p);
  EXPECT_EQ(own.backend, BLASST_BACKEND_CUDA_SM80);
  EXPECT_EQ(own.shape.query_rows, hopper.shape.query_rows);
  EXPECT_EQ(own.shape.keys, hopper.shape.keys);
  EXPECT_EQ(own.shape.split_tiles, hopper.shape.split_tiles);
  EXPECT_EQ(own.shape.most_splits, hopper.shape.most_splits);
  EXPECT_EQ(own.tile_words, hopper.tile_words);
  EXPECT_EQ(own.workspace_bytes, hopper.workspace_bytes);
}

TEST(Sm80Plan, PrefillTilesAreWhatRegistersHold) {
  for (const auto& [qk, value, keys] : {std::tuple<int64_t, int64_t, int64_t>{64, 64, 128},
                                        {96, 64, 64},
                                        {96, 96, 64},
                                        {128, 128, 64},
                                        {192, 128, 32},
                                        {256, 256, 32}}) {
    P p = dense_call(kRoom);
    p.problem.head_dim = qk, p.problem.value_dim = value;
    const Plan plan = prefill_plan(p);
    EXPECT_EQ(plan.backend, BLASST_BACKEND_CUDA_SM80);
    EXPECT_EQ(plan.shape.query_rows, 64);
    EXPECT_EQ(plan.shape.keys, keys) << qk;
  }
}

// Where no backend is named, whatever GPU there is.
TEST(Sm80Plan, TakesTheHeadSizesThatTheHopperKernelsLack) {
  for (const int64_t value : {64, 96}) {
    for (const bool decode : {false, true}) {
      P p = decode ? kDecode() : kPrefill();
      p.problem.head_dim = 96, p.problem.value_dim = value;
      const auto chosen = [&](blasst_backend wanted) {
        p.execution.backend = wanted;
        return (decode ? blasst::decode_plan(p) : blasst::prefill_plan(p)).backend;
      };
      EXPECT_EQ(chosen(BLASST_BACKEND_CUDA), BLASST_BACKEND_CUDA_SM80) << value;
      try {
        chosen(BLASST_BACKEND_CUDA_SM90);
        ADD_FAILURE() << "accepted: " << value;
      } catch (const Error& error) {
        EXPECT_EQ(error.status(), BLASST_UNSUPPORTED);
        const std::string message = error.what();
        EXPECT_TRUE(message.starts_with("cuda-sm90: head_dim is 96")) << message;
      }
    }
  }
}

TEST(Sm80Plan, DecodeTakesTheStagesThatFit) {
  using decode::sm80::SharedMemory;
  using decode::sm80::stages;
  constexpr int kKiB = 1024;
  constexpr SharedMemory a100{163 * kKiB, 164 * kKiB}, l4{99 * kKiB, 100 * kKiB},
      hopper{227 * kKiB, 228 * kKiB};
  const int fixed = 4 * kKiB, each = 35 * kKiB;       // about those of 16 rows at 128 elements
  EXPECT_EQ(stages(hopper, fixed, each), 3);          // twice
  EXPECT_EQ(stages(a100, fixed, each), 2);            // twice
  EXPECT_EQ(stages(l4, fixed, each), 2);              // once
  EXPECT_EQ(stages(hopper, 8 * kKiB, 66 * kKiB), 3);  // at 256: once
  EXPECT_EQ(stages(l4, 8 * kKiB, 66 * kKiB), 1);
  EXPECT_EQ(stages(l4, 40 * kKiB, 66 * kKiB), 0);
}

// What a card has no room for is a plan's error there, not a call's.
TEST(Sm80Plan, DecodeNeedsRoomForOneStage) {
  constexpr int kKiB = 1024;
  const decode::sm80::SharedMemory l4{99 * kKiB, 100 * kKiB}, hopper{227 * kKiB, 228 * kKiB};
  P p = kDecode();
  p.problem.head_dim = p.problem.value_dim = 256, p.problem.query_length = 1;
  p.problem.heads = 40, p.problem.kv_heads = 1;
  EXPECT_NO_THROW(decode::sm80::check_room(p.problem, hopper));
  try {
    decode::sm80::check_room(p.problem, l4);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), BLASST_UNSUPPORTED);
    const std::string message = error.what();
    EXPECT_NE(message.find("head size 256 and 40 query rows"), message.npos) << message;
    EXPECT_NE(message.find("it may have 101376"), message.npos) << message;
  }
  p.problem.heads = 32;
  EXPECT_NO_THROW(decode::sm80::check_room(p.problem, l4));
}

bool fits(const check::Case& c, decode::sm80::SharedMemory room) {
  int64_t queries = 0;
  for (const check::Lengths& r : c.requests) queries = std::max(queries, r.queries);
  try {
    decode::sm80::check_room({.heads = c.heads,
                              .kv_heads = c.kv_heads,
                              .head_dim = c.head_dim,
                              .value_dim = c.value_dim,
                              .query_length = queries},
                             room);
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Random problems, of tests and `blasst verify`, ask a card for what it has.
TEST(Sm80Plan, RandomProblemsFitInTheRoomOfOtherCards) {
  constexpr int kKiB = 1024;
  const decode::sm80::SharedMemory l4{99 * kKiB, 100 * kKiB}, a100{163 * kKiB, 164 * kKiB};
  int too_large = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const check::Case c = check::random_case(seed);
    if (!c.decode) continue;
    const check::Case large = check::for_kernels(c, check::portable_kernels(64));
    EXPECT_TRUE(fits(large, a100)) << check::describe(large);
    too_large += !fits(large, l4);
    const check::Case small = check::for_kernels(c, check::portable_kernels(32));
    EXPECT_TRUE(fits(small, l4)) << check::describe(small);
  }
  EXPECT_GT(too_large, 0);
}

TEST(Sm80Plan, BackwardIsRefusedByName) {
  try {
    sm80_backend().plan(BackwardParams{});
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), BLASST_UNSUPPORTED);
    EXPECT_STREQ(error.what(), "cuda-sm80: it has no backward; it does prefill and decode");
  }
}

}  // namespace
}  // namespace blasst::cuda
