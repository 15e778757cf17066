// What the host checks before a prefill call reaches the GPU, and what it passes on. No GPU needed.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "cuda/sm90/prefill/plan.h"

namespace blasst::cuda::prefill {
namespace {

// Addresses that nothing reads.
void* device(uintptr_t address) { return reinterpret_cast<void*>(address); }

constexpr int64_t kLength = 1000, kHeads = 8, kKvHeads = 2, kDim = 128;

PrefillParams dense() {
  PrefillParams p{.backend = BLASST_BACKEND_CUDA_SM90,
                  .dtype = BLASST_BFLOAT16,
                  .batch = 3,
                  .heads = kHeads,
                  .kv_heads = kKvHeads,
                  .head_dim = kDim,
                  .value_dim = kDim,
                  .query_length = kLength};
  const auto view = [](uintptr_t address, int64_t heads) {
    return View{.data = device(address),
                .elements = 3 * kLength * heads * kDim,
                .stride_request = kLength * heads * kDim,
                .stride_token = heads * kDim,
                .stride_head = kDim};
  };
  p.q = view(0x10000000, kHeads);
  p.out = view(0x20000000, kHeads);
  p.kv.k = view(0x30000000, kKvHeads);
  p.kv.v = view(0x40000000, kKvHeads);
  p.kv.key_length = kLength;
  p.mask.causal = 1;
  p.workspace = device(0x50000000);
  p.workspace_bytes = kWorkspaceBytes;
  return p;
}

PrefillParams ragged() {
  PrefillParams p = dense();
  p.cu_seqlens_q = static_cast<const int32_t*>(device(0x60000000));
  p.rows = 2000;
  p.kv.cu_seqlens = p.cu_seqlens_q;
  return p;
}

PrefillParams paged() {
  PrefillParams p = dense();
  p.kv.page_table = static_cast<const int32_t*>(device(0x60000000));
  p.kv.lengths = static_cast<const int32_t*>(device(0x70000000));
  p.kv.page_table_stride = 20;
  p.kv.page_size = 64;
  p.kv.pages = 40;
  p.kv.key_length = 0;
  p.kv.k.stride_request = p.kv.v.stride_request = 64 * kKvHeads * kDim;
  return p;
}

struct Bad {
  std::string name;
  PrefillParams (*good)();
  std::function<void(PrefillParams&)> bend;
  std::vector<std::string> says;
  blasst_status status = BLASST_INVALID_ARGUMENT;
};

class PrefillPlanRejects : public testing::TestWithParam<Bad> {};

TEST_P(PrefillPlanRejects, AndSaysWhy) {
  PrefillParams p = GetParam().good();
  EXPECT_NO_THROW(plan(p));
  GetParam().bend(p);
  try {
    plan(p);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), GetParam().status);
    for (const std::string& part : GetParam().says)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

using P = PrefillParams;

INSTANTIATE_TEST_SUITE_P(
    , PrefillPlanRejects,
    testing::Values(
        Bad{"Float32",
            dense,
            [](P& p) { p.dtype = BLASST_FLOAT32; },
            {"float32", "bfloat16"},
            BLASST_UNSUPPORTED},
        Bad{"Dim",
            dense,
            [](P& p) { p.head_dim = p.value_dim = 96; },
            {"96", "64, 128 and 256"},
            BLASST_UNSUPPORTED},
        Bad{"ValueDim", dense, [](P& p) { p.value_dim = 64; }, {"128", "64"}, BLASST_UNSUPPORTED},
        Bad{"BlockMask",
            dense,
            [](P& p) { p.mask.blocks = static_cast<const uint8_t*>(device(0x80000000)); },
            {"mask.blocks"},
            BLASST_UNSUPPORTED},
        Bad{"Places",
            dense,
            [](P& p) { p.test.places = 2; },
            {"test.places is 2"},
            BLASST_UNSUPPORTED},
        Bad{"TileMaxima",
            dense,
            [](P& p) { p.report.tile_maxima = static_cast<float*>(device(0x80000000)); },
            {"report.tile_maxima"},
            BLASST_UNSUPPORTED},
        Bad{"Threads", dense, [](P& p) { p.threads = 4; }, {"threads is 4"}, BLASST_UNSUPPORTED},
        Bad{"Misaligned",
            dense,
            [](P& p) { p.q.data = device(0x10000008); },
            {"q.data", "16-byte"},
            BLASST_UNSUPPORTED},
        Bad{"Stride",
            dense,
            [](P& p) { p.kv.v.stride_token -= 4; },
            {"v.stride_token", "8"},
            BLASST_UNSUPPORTED},
        Bad{"PageSize",
            paged,
            [](P& p) { p.kv.page_size = 48; },
            {"page_size is 48", "16, 32"},
            BLASST_UNSUPPORTED},
        Bad{"Workspace", dense, [](P& p) { p.workspace_bytes = 0; }, {"workspace has 0 bytes"}},
        Bad{"WorkspaceMisaligned",
            dense,
            [](P& p) { p.workspace = device(0x50000004); },
            {"workspace", "16-byte"}},
        Bad{"RowsOfDense", dense, [](P& p) { p.rows = 7; }, {"rows is 7"}},
        Bad{"RowsOfRagged", ragged, [](P& p) { p.rows = 3001; }, {"rows is 3001", "query_length"}},
        Bad{"QuerySmall", dense, [](P& p) { p.q.elements -= 1; }, {"q reaches element"}},
        Bad{"KeysSmall", dense, [](P& p) { p.kv.k.elements /= 2; }, {"k reaches element"}},
        Bad{"OutOverlaps", dense, [](P& p) { p.out.stride_head = 64; }, {"overlaps"}},
        Bad{"OutIsQuery", dense, [](P& p) { p.out.data = p.q.data; }, {"share memory"}},
        Bad{"PagedNoLengths", paged, [](P& p) { p.kv.lengths = nullptr; }, {"kv.lengths is null"}},
        Bad{"PagedTooLong", paged, [](P& p) { p.kv.key_length = 2000; }, {"2000", "1280"}},
        Bad{"TwoLayouts", ragged, [](P& p) { p.kv.lengths = p.kv.cu_seqlens; }, {"one layout"}},
        Bad{"Thresholds",
            dense,
            [](P& p) { p.test.kind = BLASST_TEST_RELATIVE; },
            {"test.values is null"}},
        Bad{"Order", dense, [](P& p) { p.order = static_cast<Order>(9); }, {"order is 9"}}),
    [](const auto& info) { return info.param.name; });

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
  EXPECT_EQ(d.params.rows, 3 * kLength);
  EXPECT_EQ(d.k.outer, 3);
  EXPECT_EQ(d.params.least_distance, 0);
  EXPECT_EQ(d.params.most_distance, kUnlimited);
  const Launch r = plan(ragged());
  EXPECT_EQ(r.q.outer, 1);
  EXPECT_EQ(r.q.tokens, 2000);
  EXPECT_EQ(r.k.tokens, 3 * kLength);  // what the buffer holds
  const Launch g = plan(paged());
  EXPECT_EQ(g.params.key_length, 20 * 64);
  EXPECT_EQ(g.k.outer, 40);
  EXPECT_EQ(g.k.tokens, 64);
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
  p.q.stride_request = p.out.stride_request = kLength * kHeads * 256;
  p.q.data = device(uintptr_t{1} << 40);
  p.out.data = device(uintptr_t{2} << 40);
  p.kv.k.data = device(uintptr_t{3} << 40);
  p.kv.v.data = device(uintptr_t{4} << 40);
  EXPECT_EQ(tile_shape(p).keys, 64);
}

}  // namespace
}  // namespace blasst::cuda::prefill
