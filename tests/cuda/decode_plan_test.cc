// What the host checks before a decode call reaches the GPU, and what it passes on. No GPU needed.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "cuda/sm90/decode/plan.h"

namespace blasst::cuda::decode {
namespace {

// Addresses that nothing reads.
void* device(uintptr_t address) { return reinterpret_cast<void*>(address); }

constexpr int64_t kRoom = 1000, kHeads = 8, kKvHeads = 2, kDim = 128;

DecodeParams dense() {
  DecodeParams p{.backend = BLASST_BACKEND_CUDA_SM90,
                 .dtype = BLASST_BFLOAT16,
                 .batch = 3,
                 .heads = kHeads,
                 .kv_heads = kKvHeads,
                 .head_dim = kDim,
                 .value_dim = kDim,
                 .query_length = 2};
  const auto view = [](uintptr_t address, int64_t tokens, int64_t heads) {
    return View{.data = device(address),
                .elements = 3 * tokens * heads * kDim,
                .stride_request = tokens * heads * kDim,
                .stride_token = heads * kDim,
                .stride_head = kDim};
  };
  p.q = view(0x10000000, 2, kHeads);
  p.out = view(0x20000000, 2, kHeads);
  p.kv.k = view(0x30000000, kRoom, kKvHeads);
  p.kv.v = view(0x40000000, kRoom, kKvHeads);
  p.kv.key_length = kRoom;
  p.kv.lengths = static_cast<const int32_t*>(device(0x70000000));
  p.mask.causal = 1;
  p.workspace = device(0x50000000);
  p.workspace_bytes = workspace_bytes(p);
  return p;
}

DecodeParams paged() {
  DecodeParams p = dense();
  p.kv.page_table = static_cast<const int32_t*>(device(0x60000000));
  p.kv.page_table_stride = 15;
  p.kv.page_size = 64;
  p.kv.pages = 40;
  p.kv.key_length = 0;
  p.kv.k.stride_request = p.kv.v.stride_request = 64 * kKvHeads * kDim;
  p.workspace_bytes = workspace_bytes(p);
  return p;
}

struct Bad {
  std::string name;
  DecodeParams (*good)();
  std::function<void(DecodeParams&)> bend;
  std::vector<std::string> says;
  blasst_status status = BLASST_INVALID_ARGUMENT;
};

class DecodePlanRejects : public testing::TestWithParam<Bad> {};

TEST_P(DecodePlanRejects, AndSaysWhy) {
  DecodeParams p = GetParam().good();
  EXPECT_NO_THROW(plan(p));
  GetParam().bend(p);
  try {
    plan(p);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.status(), GetParam().status) << e.what();
    for (const std::string& text : GetParam().says)
      EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << e.what();
  }
}

INSTANTIATE_TEST_SUITE_P(
    , DecodePlanRejects,
    testing::Values(
        Bad{"Float32",
            dense,
            [](auto& p) { p.dtype = BLASST_FLOAT32; },
            {"float32"},
            BLASST_UNSUPPORTED},
        Bad{"Dims",
            dense,
            [](auto& p) { p.head_dim = p.value_dim = 96; },
            {"96", "64, 128"},
            BLASST_UNSUPPORTED},
        Bad{"TooManyRows",
            dense,
            [](auto& p) { p.heads = 32, p.query_length = 5; },
            {"80 rows", "64"},
            BLASST_UNSUPPORTED},
        Bad{"TooManyPositions", dense, [](auto& p) { p.query_length = 17; }, {"17", "1 to 16"}},
        Bad{"Bands",
            dense,
            [](auto& p) { p.mask.bands = static_cast<const int64_t*>(device(0x80000000)); },
            {"bands"},
            BLASST_UNSUPPORTED},
        Bad{"Blocks",
            dense,
            [](auto& p) { p.mask.blocks = static_cast<const uint8_t*>(device(0x80000000)); },
            {"blocks"},
            BLASST_UNSUPPORTED},
        Bad{"Places",
            dense,
            [](auto& p) { p.test.places = 2; },
            {"test.places is 2"},
            BLASST_UNSUPPORTED},
        Bad{"TileMaxima",
            dense,
            [](auto& p) { p.report.tile_maxima = static_cast<float*>(device(0x80000000)); },
            {"report.tile_maxima"},
            BLASST_UNSUPPORTED},
        Bad{"Threads", dense, [](auto& p) { p.threads = 2; }, {"threads"}, BLASST_UNSUPPORTED},
        Bad{"Unaligned",
            dense,
            [](auto& p) { p.kv.v.stride_token -= 4; },
            {"v.stride_token"},
            BLASST_UNSUPPORTED},
        Bad{"KeysTooShort", dense, [](auto& p) { p.kv.k.elements -= 8; }, {"k reaches element"}},
        Bad{"OutIsQ", dense, [](auto& p) { p.out = p.q; }, {"out and q share memory"}},
        Bad{"Workspace",
            dense,
            [](auto& p) { p.workspace_bytes -= 1; },
            {"a cuda call allocates nothing"}},
        Bad{"WorkspaceAddress",
            dense,
            [](auto& p) { p.workspace = device(0x50000010); },
            {"256-byte aligned"}},
        Bad{"PageSize",
            paged,
            [](auto& p) { p.kv.page_size = 48; },
            {"48", "16, 32, 64"},
            BLASST_UNSUPPORTED},
        Bad{"NoLengths", paged, [](auto& p) { p.kv.lengths = nullptr; }, {"kv.lengths is null"}},
        Bad{"PageTableRoom", paged, [](auto& p) { p.kv.key_length = 961; }, {"961", "960"}}),
    [](const auto& info) { return info.param.name; });

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
