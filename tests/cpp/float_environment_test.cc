// A call computes in the default floating-point environment, whatever its caller has set, on any
// number of threads, and gives the caller's back.
#include <gtest/gtest.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "blasst/chunks.hpp"
#include "testing/problem.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace blasst::check {
namespace {

struct Environment {
  std::string name;
  std::function<void()> set;
};

void PrintTo(const Environment& environment, std::ostream* os) { *os << environment.name; }

std::vector<Environment> environments() {
  std::vector<Environment> all;
  for (const auto& [name, rounding] :
       {std::pair{"Upward", FE_UPWARD}, std::pair{"Downward", FE_DOWNWARD},
        std::pair{"TowardZero", FE_TOWARDZERO}})
    all.push_back({name, [rounding = rounding] { std::fesetround(rounding); }});
#if defined(__x86_64__)
  constexpr unsigned flush_to_zero = 0x8000, denormals_are_zero = 0x0040, no_invalid_mask = 0x0080;
  all.push_back(
      {"FlushToZero", [] { _mm_setcsr(_mm_getcsr() | flush_to_zero | denormals_are_zero); }});
  all.push_back({"TrapsOnInvalid", [] { _mm_setcsr(_mm_getcsr() & ~no_invalid_mask); }});
#elif defined(__aarch64__)
  all.push_back({"FlushToZero", [] {
                   uint64_t control;
                   asm volatile("mrs %0, fpcr" : "=r"(control));
                   asm volatile("msr fpcr, %0" : : "r"(control | uint64_t{1} << 24));
                 }});
#endif
  return all;
}

// Runs `body` in an environment, and says whether that is still set after it.
bool stays_set(const Environment& environment, const std::function<void()>& body) {
  std::fenv_t before, set, after;
  std::fegetenv(&before);
  environment.set();
  std::fegetenv(&set);
  body();
  std::fegetenv(&after);
  std::fesetenv(&before);
  return std::memcmp(&set, &after, sizeof set) == 0;
}

template <typename T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  const auto* data = reinterpret_cast<const std::byte*>(values.data());
  return {data, data + values.size() * sizeof(T)};
}

class InEveryEnvironment : public testing::TestWithParam<Environment> {
 protected:
  // The call's results are those of one thread in the environment of this program.
  static void expect_same(const std::function<std::vector<std::byte>(int threads)>& call) {
    const std::vector<std::byte> wanted = call(1);
    for (const int threads : {1, 2, 5}) {
      std::vector<std::byte> found;
      EXPECT_TRUE(stays_set(GetParam(), [&] { found = call(threads); }));
      EXPECT_TRUE(found == wanted) << threads << " threads";
    }
  }
};

Case subnormal_case() {
  return {.requests = {{5, 300}, {5, 290}},
          .heads = 4,
          .kv_heads = 2,
          .layout = Layout::kRagged,
          .sinks = true,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.01f};
}

// Values so small that outputs are subnormal.
void shrink_values(Problem& problem) {
  const Access access(problem.params);
  for (size_t b = 0; b < access.requests().size(); ++b) {
    for (int64_t token = 0; token < access.requests()[b].keys; ++token) {
      for (int64_t head = 0; head < problem.params.problem.kv_heads; ++head) {
        auto* row = reinterpret_cast<float*>(access.value(b, token, head));
        for (int64_t d = 0; d < problem.params.problem.value_dim; ++d) row[d] *= 1e-39f;
      }
    }
  }
}

TEST_P(InEveryEnvironment, Attention) {
  for (const bool decode : {false, true}) {
    Case c = subnormal_case();
    c.decode = decode;
    Problem problem(c);
    shrink_values(problem);
    expect_same([&](int threads) {
      problem.params.execution.threads = threads;
      problem.run();
      std::vector<std::byte> bits = problem.out_bits();
      for (const auto& more : {bytes_of(problem.lse), bytes_of(problem.dropped_mass_bound)})
        bits.insert(bits.end(), more.begin(), more.end());
      return bits;
    });
    const std::vector<float> out = problem.out();
    EXPECT_TRUE(std::ranges::any_of(out, [](float x) {
      return std::fpclassify(x) == FP_SUBNORMAL;
    })) << "the case has nothing to flush";
  }
}

TEST_P(InEveryEnvironment, Reference) {
  Problem problem(subnormal_case());
  const TileShape shape = prefill_plan(problem.params).shape;
  expect_same([&](int) {
    const reference::Result result = refer(problem.params, false, shape);
    std::vector<std::byte> bits = bytes_of(result.out);
    const std::vector<std::byte> lse = bytes_of(result.lse);
    bits.insert(bits.end(), lse.begin(), lse.end());
    return bits;
  });
}

TEST_P(InEveryEnvironment, Backward) {
  constexpr int64_t kRows = 100, kHeads = 2, kDim = 32, kSize = kRows * kHeads * kDim;
  std::vector<float> q(kSize), k(kSize), v(kSize), out(kSize), dout(kSize);
  for (int64_t i = 0; i < kSize; ++i) {
    q[i] = std::sin(0.1f * i), k[i] = std::cos(0.3f * i), v[i] = std::sin(0.7f * i);
    dout[i] = 1e-38f * std::cos(0.9f * i);
  }
  const auto view = [](std::vector<float>& values) {
    return View{.data = values.data(),
                .elements = kSize,
                .stride_token = kHeads * kDim,
                .stride_head = kDim};
  };
  std::vector<float> lse(kHeads * kRows);
  const blasst::Problem problem{.heads = kHeads,
                                .kv_heads = kHeads,
                                .head_dim = kDim,
                                .value_dim = kDim,
                                .query_length = kRows,
                                .q = view(q),
                                .out = view(out),
                                .kv = {.k = view(k), .v = view(v), .key_length = kRows}};
  prefill({.problem = problem, .report = {.lse = lse.data()}});
  expect_same([&](int threads) {
    std::vector<float> dq(kSize), dk(kSize), dv(kSize);
    backward({.problem = problem,
              .gradients = {.dout = view(dout),
                            .lse = lse.data(),
                            .dq = view(dq),
                            .dk = view(dk),
                            .dv = view(dv)},
              .execution = {.threads = threads}});
    std::vector<std::byte> bits = bytes_of(dq);
    for (const auto& more : {bytes_of(dk), bytes_of(dv)})
      bits.insert(bits.end(), more.begin(), more.end());
    return bits;
  });
}

TEST_P(InEveryEnvironment, Merge) {
  constexpr int64_t kRows = 50, kHeads = 2, kDim = 16, kSize = kRows * kHeads * kDim;
  std::vector<float> a(kSize), b(kSize), lse_a(kRows * kHeads), lse_b(kRows * kHeads);
  for (int64_t i = 0; i < kSize; ++i) a[i] = 1e-38f * std::sin(i), b[i] = 1e-38f * std::cos(i);
  for (int64_t i = 0; i < kRows * kHeads; ++i) lse_a[i] = std::sin(i), lse_b[i] = std::cos(i);
  const auto view = [](std::vector<float>& values) {
    return View{.data = values.data(),
                .elements = kSize,
                .stride_token = kHeads * kDim,
                .stride_head = kDim};
  };
  expect_same([&](int threads) {
    std::vector<float> out(kSize), lse(kRows * kHeads);
    MergeParams p{.query_length = kRows, .heads = kHeads, .value_dim = kDim};
    p.out_a = view(a), p.out_b = view(b), p.out = view(out);
    p.lse_a = lse_a.data(), p.lse_b = lse_b.data(), p.lse = lse.data();
    p.execution.threads = threads;
    merge(p);
    std::vector<std::byte> bits = bytes_of(out);
    const std::vector<std::byte> more = bytes_of(lse);
    bits.insert(bits.end(), more.begin(), more.end());
    return bits;
  });
}

TEST_P(InEveryEnvironment, Chunks) {
  constexpr int64_t kKeys = 600, kHeads = 2, kDim = 16, kSize = kKeys * kHeads * kDim;
  std::vector<float> k(kSize);
  for (int64_t i = 0; i < kSize; ++i) k[i] = std::sin(0.37f * i) + std::cos(0.011f * i * i);
  const HeadRows rows{.data = k.data(),
                      .elements = kSize,
                      .rows = kKeys,
                      .heads = kHeads,
                      .head_dim = kDim,
                      .stride_row = kHeads * kDim,
                      .stride_head = kDim};
  const ChunkRule rule{.chunker = BLASST_CHUNKS_SHIFT, .least = 4, .most = 64, .threshold = 0.5f};
  expect_same([&](int threads) {
    Chunks chunks;
    extend_chunks(chunks, rule, rows, threads);
    std::vector<std::byte> bits = bytes_of(chunks.sums);
    std::vector<uint8_t> blocks(kHeads * 10 * 10);
    select_tiles(chunks, kHeads, rows, false, {.share = 0.3}, blocks.data(), threads);
    std::vector<float> scores = boundary_scores(rule, rows, 1, kKeys, threads);
    for (const auto& more : {bytes_of(chunks.starts), bytes_of(blocks), bytes_of(scores)})
      bits.insert(bits.end(), more.begin(), more.end());
    return bits;
  });
}

INSTANTIATE_TEST_SUITE_P(Cpu, InEveryEnvironment, testing::ValuesIn(environments()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace blasst::check
