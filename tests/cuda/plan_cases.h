// Calls that the plans of both phases must refuse, and how. No GPU needed.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "blasst/blasst.hpp"

namespace blasst::cuda {

// Addresses that nothing reads.
inline void* device(uintptr_t address) { return reinterpret_cast<void*>(address); }
template <typename T>
const T* array(uintptr_t address) {
  return static_cast<const T*>(device(address));
}

inline constexpr int64_t kRoom = 1000, kHeads = 8, kKvHeads = 2, kDim = 128;

// Three requests with room for kRoom keys.
inline AttentionParams dense_call(int64_t query_length) {
  const auto view = [](uintptr_t address, int64_t tokens, int64_t heads) {
    return View{.data = device(address),
                .dtype = BLASST_BFLOAT16,
                .elements = 3 * tokens * heads * kDim,
                .stride_request = tokens * heads * kDim,
                .stride_token = heads * kDim,
                .stride_head = kDim};
  };
  return {.problem = {.batch = 3,
                      .heads = kHeads,
                      .kv_heads = kKvHeads,
                      .head_dim = kDim,
                      .value_dim = kDim,
                      .query_length = query_length,
                      .q = view(0x10000000, query_length, kHeads),
                      .out = view(0x20000000, query_length, kHeads),
                      .kv = {.k = view(0x30000000, kRoom, kKvHeads),
                             .v = view(0x40000000, kRoom, kKvHeads),
                             .key_length = kRoom},
                      .mask = {.causal = 1}},
          .execution = {.backend = BLASST_BACKEND_CUDA, .workspace = device(0x50000000)}};
}

// The same over 40 pages of 64 tokens, 15 a request.
inline AttentionParams paged_call(AttentionParams params) {
  KeysValues& kv = params.problem.kv;
  kv.layout = BLASST_LAYOUT_PAGED;
  kv.page_table = array<int32_t>(0x60000000);
  kv.lengths = array<int32_t>(0x70000000);
  kv.page_table_stride = 15;
  kv.page_size = 64;
  kv.pages = 40;
  kv.key_length = 0;
  kv.k.stride_request = kv.v.stride_request = 64 * kKvHeads * kDim;
  return params;
}

// With the workspace that they need.
template <auto kPlan>
AttentionParams with_workspace(AttentionParams params) {
  params.execution.workspace_bytes = kPlan(params).workspace_bytes;
  return params;
}
template <auto kPlan, int64_t kQueryLength>
AttentionParams dense_call_of() {
  return with_workspace<kPlan>(dense_call(kQueryLength));
}
template <auto kPlan, int64_t kQueryLength>
AttentionParams paged_call_of() {
  return with_workspace<kPlan>(paged_call(dense_call(kQueryLength)));
}

struct Bad {
  std::string name;
  AttentionParams (*good)();
  std::function<void(AttentionParams&)> bend;
  std::vector<std::string> says;
  blasst_status status = BLASST_INVALID_ARGUMENT;
};

template <typename Plan>
void expect_refusal(const Bad& bad, const Plan& plan) {
  AttentionParams p = bad.good();
  EXPECT_NO_THROW(plan(p));
  bad.bend(p);
  try {
    plan(p);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), bad.status) << error.what();
    for (const std::string& part : bad.says)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

inline std::string name_of(const testing::TestParamInfo<Bad>& info) { return info.param.name; }

// What no phase takes, and `more`.
inline std::vector<Bad> refused(AttentionParams (*dense)(), AttentionParams (*paged)(),
                                std::vector<Bad> more) {
  using P = AttentionParams;
  std::vector<Bad> cases = {
      {"Float32",
       dense,
       [](P& p) {
         for (View* view : {&p.problem.q, &p.problem.kv.k, &p.problem.kv.v, &p.problem.out})
           view->dtype = BLASST_FLOAT32;
       },
       {"float32", "bfloat16"},
       BLASST_UNSUPPORTED},
      {"MixedTypes",
       dense,
       [](P& p) { p.problem.kv.v.dtype = BLASST_FLOAT16; },
       {"cuda", "q is bfloat16 and v float16"},
       BLASST_UNSUPPORTED},
      {"TileKeys",
       dense,
       [](P& p) { p.decision.tile_keys = 96; },
       {"cuda", "tile_keys 96"},
       BLASST_UNSUPPORTED},
      {"Dim",
       dense,
       [](P& p) { p.problem.head_dim = p.problem.value_dim = 32; },
       {"head_dim is 32 and value_dim 32", "64/64", "128/128"},
       BLASST_UNSUPPORTED},
      {"ValueDim",
       dense,
       [](P& p) { p.problem.value_dim = 64; },
       {"head_dim is 128 and value_dim 64"},
       BLASST_UNSUPPORTED},
      {"BlockMask",
       dense,
       [](P& p) { p.problem.mask.blocks = array<uint8_t>(0x80000000); },
       {"mask.blocks"},
       BLASST_UNSUPPORTED},
      {"Threads",
       dense,
       [](P& p) { p.execution.threads = 4; },
       {"threads is 4"},
       BLASST_UNSUPPORTED},
      {"Misaligned",
       dense,
       [](P& p) { p.problem.q.data = device(0x10000008); },
       {"q.data", "16-byte"},
       BLASST_UNSUPPORTED},
      {"Stride",
       dense,
       [](P& p) { p.problem.kv.v.stride_token -= 4; },
       {"v.stride_token", "8"},
       BLASST_UNSUPPORTED},
      {"PageSize",
       paged,
       [](P& p) { p.problem.kv.page_size = 48; },
       {"page_size is 48", "16, 32"},
       BLASST_UNSUPPORTED},
      {"QueriesShort", dense, [](P& p) { p.problem.q.elements -= 1; }, {"q reaches element"}},
      {"KeysShort", dense, [](P& p) { p.problem.kv.k.elements -= 8; }, {"k reaches element"}},
      {"OutOverlaps", dense, [](P& p) { p.problem.out.stride_head = 64; }, {"overlaps"}},
      {"OutIsQuery", dense, [](P& p) { p.problem.out = p.problem.q; }, {"share memory"}},
      {"NoLengths", paged, [](P& p) { p.problem.kv.lengths = nullptr; }, {"kv.lengths is null"}},
      {"PageTableRoom", paged, [](P& p) { p.problem.kv.key_length = 961; }, {"961", "960"}},
      {"PagesAndStarts",
       paged,
       [](P& p) { p.problem.kv.starts = p.problem.kv.lengths; },
       {"kv.starts is set", "kv.layout dense"}},
      {"WorkspaceSmall", dense, [](P& p) { p.execution.workspace_bytes -= 1; }, {"workspace has"}},
      {"WorkspaceMisaligned",
       dense,
       [](P& p) { p.execution.workspace = device(0x50000004); },
       {"workspace", "aligned"}},
      {"Thresholds",
       dense,
       [](P& p) { p.decision.test.kind = BLASST_TEST_RELATIVE; },
       {"test.values is null"}},
      {"Order", dense, [](P& p) { p.decision.order = static_cast<Order>(9); }, {"order is 9"}}};
  cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}

}  // namespace blasst::cuda
