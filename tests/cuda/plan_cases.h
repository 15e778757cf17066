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
template <typename Call>
Call dense_call(int64_t query_length) {
  Call p{.backend = BLASST_BACKEND_CUDA_SM90,
         .dtype = BLASST_BFLOAT16,
         .batch = 3,
         .heads = kHeads,
         .kv_heads = kKvHeads,
         .head_dim = kDim,
         .value_dim = kDim,
         .query_length = query_length};
  const auto view = [](uintptr_t address, int64_t tokens, int64_t heads) {
    return View{.data = device(address),
                .elements = 3 * tokens * heads * kDim,
                .stride_request = tokens * heads * kDim,
                .stride_token = heads * kDim,
                .stride_head = kDim};
  };
  p.q = view(0x10000000, query_length, kHeads);
  p.out = view(0x20000000, query_length, kHeads);
  p.kv.k = view(0x30000000, kRoom, kKvHeads);
  p.kv.v = view(0x40000000, kRoom, kKvHeads);
  p.kv.key_length = kRoom;
  p.mask.causal = 1;
  p.workspace = device(0x50000000);
  return p;
}

// The same over 40 pages of 64 tokens, 15 a request.
template <typename Call>
Call paged_call(Call p) {
  p.kv.page_table = array<int32_t>(0x60000000);
  p.kv.lengths = array<int32_t>(0x70000000);
  p.kv.page_table_stride = 15;
  p.kv.page_size = 64;
  p.kv.pages = 40;
  p.kv.key_length = 0;
  p.kv.k.stride_request = p.kv.v.stride_request = 64 * kKvHeads * kDim;
  return p;
}

template <typename Call>
struct Bad {
  std::string name;
  Call (*good)();
  std::function<void(Call&)> bend;
  std::vector<std::string> says;
  blasst_status status = BLASST_INVALID_ARGUMENT;
};

template <typename Call, typename Plan>
void expect_refusal(const Bad<Call>& bad, const Plan& plan) {
  Call p = bad.good();
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

template <typename Call>
std::string name_of(const testing::TestParamInfo<Bad<Call>>& info) {
  return info.param.name;
}

// What no phase takes, and `more`.
template <typename Call>
std::vector<Bad<Call>> refused(Call (*dense)(), Call (*paged)(), std::vector<Bad<Call>> more) {
  using P = Call;
  std::vector<Bad<P>> cases = {
      {"Float32",
       dense,
       [](P& p) { p.dtype = BLASST_FLOAT32; },
       {"float32", "bfloat16"},
       BLASST_UNSUPPORTED},
      {"Dim",
       dense,
       [](P& p) { p.head_dim = p.value_dim = 96; },
       {"96", "64, 128 and 256"},
       BLASST_UNSUPPORTED},
      {"ValueDim", dense, [](P& p) { p.value_dim = 64; }, {"128", "64"}, BLASST_UNSUPPORTED},
      {"BlockMask",
       dense,
       [](P& p) { p.mask.blocks = array<uint8_t>(0x80000000); },
       {"mask.blocks"},
       BLASST_UNSUPPORTED},
      {"Threads", dense, [](P& p) { p.threads = 4; }, {"threads is 4"}, BLASST_UNSUPPORTED},
      {"Misaligned",
       dense,
       [](P& p) { p.q.data = device(0x10000008); },
       {"q.data", "16-byte"},
       BLASST_UNSUPPORTED},
      {"Stride",
       dense,
       [](P& p) { p.kv.v.stride_token -= 4; },
       {"v.stride_token", "8"},
       BLASST_UNSUPPORTED},
      {"PageSize",
       paged,
       [](P& p) { p.kv.page_size = 48; },
       {"page_size is 48", "16, 32"},
       BLASST_UNSUPPORTED},
      {"QueriesShort", dense, [](P& p) { p.q.elements -= 1; }, {"q reaches element"}},
      {"KeysShort", dense, [](P& p) { p.kv.k.elements -= 8; }, {"k reaches element"}},
      {"OutOverlaps", dense, [](P& p) { p.out.stride_head = 64; }, {"overlaps"}},
      {"OutIsQuery", dense, [](P& p) { p.out = p.q; }, {"share memory"}},
      {"NoLengths", paged, [](P& p) { p.kv.lengths = nullptr; }, {"kv.lengths is null"}},
      {"PageTableRoom", paged, [](P& p) { p.kv.key_length = 961; }, {"961", "960"}},
      {"PagesAndStarts",
       paged,
       [](P& p) { p.kv.starts = p.kv.lengths; },
       {"kv.starts", "dense keys"}},
      {"WorkspaceSmall", dense, [](P& p) { p.workspace_bytes -= 1; }, {"workspace has"}},
      {"WorkspaceMisaligned",
       dense,
       [](P& p) { p.workspace = device(0x50000004); },
       {"workspace", "aligned"}},
      {"Thresholds",
       dense,
       [](P& p) { p.test.kind = BLASST_TEST_RELATIVE; },
       {"test.values is null"}},
      {"Order", dense, [](P& p) { p.order = static_cast<Order>(9); }, {"order is 9"}}};
  cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}

}  // namespace blasst::cuda
