// What the host checks before a backward reaches the GPU, and what it passes on. No GPU needed.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <numbers>
#include <string>
#include <vector>

#include "cuda/sm90/backward/plan.h"
#include "plan_cases.h"

namespace blasst::cuda::backward {
namespace {

using P = BackwardParams;

P dense() {
  const AttentionParams forward = dense_call(kRoom);
  P p{.problem = forward.problem, .execution = forward.execution};
  const auto like = [](View view, uintptr_t address) {
    view.data = device(address);
    return view;
  };
  Gradients& g = p.gradients;
  g.dout = like(p.problem.out, 0x60000000);
  g.dq = like(p.problem.q, 0x70000000);
  g.dk = like(p.problem.kv.k, 0x80000000);
  g.dv = like(p.problem.kv.v, 0x90000000);
  g.lse = array<float>(0xa0000000);
  g.tile_bits = array<uint32_t>(0xb0000000);
  p.execution.workspace_bytes = plan(p).workspace_bytes;
  return p;
}

struct Wrong {
  std::string name;
  std::function<void(P&)> spoil;
  std::vector<std::string> message;
  blasst_status status = BLASST_UNSUPPORTED;
};

void PrintTo(const Wrong& wrong, std::ostream* os) { *os << wrong.name; }

class BackwardPlanRejects : public testing::TestWithParam<Wrong> {};

TEST_P(BackwardPlanRejects, AndSaysWhy) {
  P p = dense();
  GetParam().spoil(p);
  try {
    plan_launch(p);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), GetParam().status) << error.what();
    for (const std::string& part : GetParam().message)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << error.what() << "\nlacks: " << part;
  }
}

INSTANTIATE_TEST_SUITE_P(
    , BackwardPlanRejects,
    testing::Values(
        Wrong{"Float32",
              [](P& p) {
                blasst_problem& q = p.problem;
                q.q.dtype = q.out.dtype = q.kv.k.dtype = q.kv.v.dtype = BLASST_FLOAT32;
              },
              {"q is float32"}},
        Wrong{
            "Dim", [](P& p) { p.problem.head_dim = p.problem.value_dim = 96; }, {"head_dim is 96"}},
        Wrong{"Dims",
              [](P& p) { p.problem.head_dim = 128, p.problem.value_dim = 192; },
              {"head_dim is 128 and value_dim 192", "192/128"}},
        Wrong{"Pages",
              [](P& p) {
                KeysValues& kv = p.problem.kv;
                kv.layout = BLASST_LAYOUT_PAGED;
                kv.page_table = array<int32_t>(0x60000000);
                kv.lengths = array<int32_t>(0x70000000);
                kv.page_table_stride = 15, kv.page_size = 64, kv.pages = 40, kv.key_length = 0;
              },
              {"kv.layout is paged (2)", "backward does dense (0) and ragged (1)"}},
        Wrong{"Blocks",
              [](P& p) { p.problem.mask.blocks = array<uint8_t>(0x60000000); },
              {"mask.blocks is set"}},
        Wrong{"GradientOfAnotherType",
              [](P& p) { p.gradients.dk.dtype = BLASST_FLOAT16; },
              {"q is bfloat16 and dk float16"}},
        Wrong{"GradientNotAligned",
              [](P& p) { p.gradients.dv.data = device(0x90000002); },
              {"dv.data", "16-byte aligned"}},
        Wrong{"Stride",
              [](P& p) { p.gradients.dout.stride_token += 1, p.gradients.dout.elements += 4096; },
              {"dout.stride_token", "multiple of 8"}},
        Wrong{"Threads", [](P& p) { p.execution.threads = 3; }, {"threads is 3"}},
        Wrong{"NoLse",
              [](P& p) { p.gradients.lse = nullptr; },
              {"lse is null"},
              BLASST_INVALID_ARGUMENT},
        Wrong{"DkInK",
              [](P& p) { p.gradients.dk = p.problem.kv.k; },
              {"dk and k share memory"},
              BLASST_INVALID_ARGUMENT},
        Wrong{"DvInDk",
              [](P& p) { p.gradients.dv.data = p.gradients.dk.data; },
              {"dv and dk share memory"},
              BLASST_INVALID_ARGUMENT},
        Wrong{"SinkGradientWithoutSinks",
              [](P& p) { p.gradients.dsinks = static_cast<float*>(device(0xc0000000)); },
              {"dsinks is set but sinks is null"},
              BLASST_INVALID_ARGUMENT},
        Wrong{"Workspace",
              [](P& p) { --p.execution.workspace_bytes; },
              {"workspace has", "this one needs"},
              BLASST_INVALID_ARGUMENT},
        Wrong{"WorkspaceNotAligned",
              [](P& p) { p.execution.workspace = device(0x50000010); },
              {"256-byte aligned"},
              BLASST_INVALID_ARGUMENT}),
    [](const auto& param) { return param.param.name; });

TEST(BackwardPlan, HasTheTilesOfTheForward) {
  for (const auto& [dim, value_dim] : {std::pair{64, 64}, {128, 128}, {192, 128}, {256, 256}}) {
    P p = dense();
    p.problem.head_dim = dim, p.problem.value_dim = value_dim;
    const Plan found = plan(p);
    EXPECT_EQ(found.shape.query_rows, 64);
    EXPECT_EQ(found.shape.keys, dim == 256 ? 64 : 128);
    EXPECT_EQ(found.query_tiles, 3 * 16);
    EXPECT_EQ(found.tile_heads, kHeads);
  }
}

TEST(BackwardPlan, WorkspaceGrowsWithRowsAndTheBitsOfTiles) {
  P p = dense();
  const auto bytes = [&](int64_t rows, int64_t keys) {
    p.problem.query_length = rows, p.problem.kv.key_length = keys;
    return static_cast<double>(plan(p).workspace_bytes);
  };
  // Two floats a row and head; a bit a tile; of a long request both gradients of a tile for each
  // head.
  const double rows = 65536, heads = 3 * kHeads;
  const double parts = 2 * 128 * kDim * sizeof(float);
  EXPECT_LE(bytes(65536, 65536),
            heads * (8 * rows + (rows / 64) * (rows / 128) / 8 + parts) + 4096);
  EXPECT_LE(bytes(4096, 4096), heads * (8 * 4096 + 64 * 32 / 8) + 4096);
  const double alike = bytes(65536, 65536);
  p.problem.head_dim = 192;
  EXPECT_EQ(bytes(65536, 65536) - alike, heads * 128 * (192 - kDim) * sizeof(float));
}

TEST(BackwardPlan, PassesScalesOn) {
  P p = dense();
  const float scale = 1 / std::sqrt(128.0f), log2e = std::numbers::log2e_v<float>;
  EXPECT_FLOAT_EQ(plan_launch(p).params.forward.score_to_log2, scale * log2e);
  EXPECT_FLOAT_EQ(plan_launch(p).params.scale, scale);
  p.problem.softcap = 30;
  EXPECT_FLOAT_EQ(plan_launch(p).params.forward.score_to_log2, 30 * log2e);
  EXPECT_FLOAT_EQ(plan_launch(p).params.forward.softcap_scale, scale / 30);
  EXPECT_FLOAT_EQ(plan_launch(p).params.scale, scale);
}

}  // namespace
}  // namespace blasst::cuda::backward
