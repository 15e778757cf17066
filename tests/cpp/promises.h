// What the tests of prefill, decode and backward share.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "testing/problem.h"

namespace blasst::check {

// A test that runs on every instruction set of this machine.
class OnEveryIsa : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_cpu_isa(GetParam()); }
  void TearDown() override { set_cpu_isa(cpu_isas().front()); }
};

// A prefill of several query tiles and key tiles, with skips among them.
inline Case sparse_case(DType dtype) {
  return {.seed = 3,
          .dtype = dtype,
          .requests = {{200, 500}, {200, 230}},
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 64,
          .value_dim = 40,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.2f};
}

inline int64_t skipped(const Problem& p) {
  return std::accumulate(p.tiles_skipped.begin(), p.tiles_skipped.end(), int64_t{0});
}

// `run` calls the library with `params` and returns what it wrote: the same with a workspace of
// `bytes`, of any alignment, and nothing around it changes.
template <typename Params, typename Run>
void expect_workspace_is_enough(Params& params, size_t bytes, const Run& run) {
  const auto wanted = run();
  std::vector<std::byte> workspace(bytes + 65, std::byte{0x5a});
  params.execution.workspace = workspace.data() + 1;
  params.execution.workspace_bytes = bytes;
  EXPECT_EQ(run(), wanted);
  for (size_t i = bytes + 1; i < workspace.size(); ++i)
    ASSERT_EQ(workspace[i], std::byte{0x5a}) << "wrote beyond the workspace";
  ASSERT_EQ(workspace[0], std::byte{0x5a}) << "wrote before the workspace";
}

// `run` of a case returns what the library wrote: the same when all cases run at once.
template <typename Run>
void expect_the_same_at_once(const std::vector<Case>& cases, const Run& run) {
  std::vector<decltype(run(cases[0]))> wanted, got(cases.size());
  for (const Case& c : cases) wanted.push_back(run(c));
  {
    std::vector<std::jthread> callers;
    for (size_t i = 0; i < cases.size(); ++i)
      callers.emplace_back([&, i] { got[i] = run(cases[i]); });
  }
  for (size_t i = 0; i < cases.size(); ++i) EXPECT_EQ(got[i], wanted[i]) << describe(cases[i]);
}

}  // namespace blasst::check
