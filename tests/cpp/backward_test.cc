// Gradients: the reference against finite differences, kernels against the reference, and the
// promises of the interface on every instruction set.
#include "testing/backward.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "promises.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

// A forward that has run, and its backward.
struct Pair {
  explicit Pair(const Case& c) : forward(std::make_unique<Problem>(c)) {
    forward->run();
    backward = std::make_unique<BackwardProblem>(*forward);
  }
  std::vector<std::byte> run() const {
    backward->run();
    return backward->bits();
  }
  std::unique_ptr<Problem> forward;
  std::unique_ptr<BackwardProblem> backward;
};

std::vector<std::byte> gradients(const Case& c) { return Pair(c).run(); }

std::vector<Case> skipping_cases() {
  std::vector<Case> cases;
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    Case c = sparse_case(dtype);
    cases.push_back(c);
    c.inputs = Inputs::kPlanted;
    c.sinks = true;
    c.softcap = 20;
    cases.push_back(c);
  }
  return cases;
}

// The sum over out . dout and lse * dlse, by the reference, along the given decisions.
double loss(const BackwardProblem& b, TileShape shape, const std::vector<bool>& kept) {
  const Problem& forward = b.forward;
  const reference::Result result = refer(forward.params, false, shape, &kept);
  const Access access(forward.params);
  double sum = 0;
  for (size_t i = 0; b.params.gradients.dlse && i < b.dlse.size(); ++i)
    sum += result.lse[i] * b.dlse[i];
  size_t at = 0;
  for (int64_t r = 0; r < forward.params.problem.batch; ++r) {
    for (int64_t i = 0; i < access.requests()[r].rows; ++i) {
      for (int64_t h = 0; h < forward.params.problem.heads; ++h) {
        const std::byte* dout = access.query_row(b.params.gradients.dout, r, i, h);
        for (int64_t d = 0; d < forward.params.problem.value_dim; ++d)
          sum += result.out[at++] * load_element(BLASST_FLOAT32, dout + 4 * d);
      }
    }
  }
  return sum;
}

TEST(ReferenceBackward, IsTheDerivativeOfTheReference) {
  for (const bool capped : {false, true}) {
    Case c{.seed = 5,
           .requests = {{70, 90}, {70, 75}, {70, 20}},  // the last has rows without a key
           .heads = 2,
           .kv_heads = 1,
           .head_dim = 16,
           .value_dim = 24,
           .softcap = capped ? 6.0f : 0.0f,
           .sinks = capped,
           .causal = true,
           .test = BLASST_TEST_RELATIVE,
           .threshold = 0.95f};
    Pair pair(c);
    ASSERT_GT(skipped(*pair.forward), 0);
    const AttentionParams& p = pair.forward->params;
    const TileShape shape = prefill_plan(p).shape;
    if (capped) pair.backward->params.gradients.dlse = pair.backward->dlse.data();
    std::vector<bool> kept;
    for (const auto& tile : refer(p, false, shape).tiles) kept.push_back(tile.kept);
    const reference::Gradients wanted = reference::backward(pair.backward->params, shape);
    const Access access(p);
    const auto slope = [&](float* x) {
      const float before = *x, up = before + 0x1p-9f, down = before - 0x1p-9f;
      *x = up;
      const double above = loss(*pair.backward, shape, kept);
      *x = down;
      const double below = loss(*pair.backward, shape, kept);
      *x = before;
      return (above - below) / (static_cast<double>(up) - down);
    };
    const auto as_floats = [](std::byte* row) { return reinterpret_cast<float*>(row); };
    for (uint64_t draw = 0; draw < 12; ++draw) {
      const auto any = [&](int64_t most, uint64_t what) {
        return static_cast<int64_t>(hash(9, draw, what) % static_cast<uint64_t>(most));
      };
      const int64_t request = any(2, 0), head = any(2, 1), position = any(70, 2), d = any(16, 3);
      const int64_t key = any(access.requests()[request].keys, 4);
      const int64_t query_row = (request * 70 + position) * 2 + head;
      const int64_t key_row = (request == 0 ? 0 : 90) + key;
      EXPECT_NEAR(slope(as_floats(access.query(request, position, head)) + d),
                  wanted.dq[query_row * 16 + d], 2e-5);
      EXPECT_NEAR(slope(as_floats(access.key(request, key, 0)) + d), wanted.dk[key_row * 16 + d],
                  2e-5);
      EXPECT_NEAR(slope(as_floats(access.value(request, key, 0)) + d), wanted.dv[key_row * 24 + d],
                  2e-5);
    }
    if (!capped) continue;
    for (int64_t head = 0; head < 2; ++head)
      EXPECT_NEAR(slope(pair.forward->sinks.data() + head), wanted.dsinks[head], 2e-5);
  }
}

class Backward : public OnEveryIsa {
 protected:
  static void expect_agreement(const Case& c) {
    const Pair pair(c);
    pair.backward->run();
    EXPECT_EQ(compare(*pair.backward).mismatch, "") << describe(c);
  }
};

TEST_P(Backward, RandomProblemsAgreeWithTheReference) {
  int64_t skips = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Pair pair(differentiable(random_case(seed, 3'000'000)));
    if (seed % 3 == 0) pair.backward->params.gradients.dlse = pair.backward->dlse.data();
    pair.backward->run();
    EXPECT_EQ(compare(*pair.backward).mismatch, "") << describe(pair.forward->description);
    skips += skipped(*pair.forward);
  }
  EXPECT_GT(skips, 200) << "too few skips to test anything";
}

TEST_P(Backward, EveryHeadDimension) {
  for (int64_t dim = 16; dim <= 256; dim += 8)
    expect_agreement({.requests = {{70, 70}},
                      .head_dim = dim,
                      .value_dim = 272 - dim,
                      .causal = true,
                      .test = BLASST_TEST_RELATIVE,
                      .threshold = 0.1f});
}

TEST_P(Backward, LengthsAroundATile) {
  for (const int64_t queries : {1, 7, 8, 9, 63, 64, 65})
    for (const int64_t keys : {1, 15, 16, 63, 64, 65, 129})
      expect_agreement({.requests = {{queries, keys}}, .head_dim = 32, .value_dim = 32});
}

TEST_P(Backward, ThresholdZeroNoTestAndNoBitsGiveTheSameBits) {
  for (Case c : skipping_cases()) {
    c.test = BLASST_TEST_NONE;
    const Pair dense(c);
    const std::vector<std::byte> wanted = dense.run();
    dense.backward->params.gradients.tile_bits = nullptr;
    EXPECT_EQ(dense.run(), wanted) << describe(c);
    c.test = BLASST_TEST_RELATIVE, c.threshold = 0;
    EXPECT_EQ(gradients(c), wanted) << describe(c);
  }
}

TEST_P(Backward, SkippedTilesContributeExactlyZero) {
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    Case c = sparse_case(dtype);
    c.requests = {{64, 512}};
    c.kv_heads = 4;
    c.inputs = Inputs::kPlanted;
    c.density = 0.4;
    c.threshold = 0.01f;
    const Pair pair(c);
    const std::vector<std::byte> before = pair.run();
    ASSERT_GT(skipped(*pair.forward), 5);
    // One query tile and as many KV heads as heads: a skipped tile's keys are nobody else's.
    const Access access(pair.forward->params);
    for (int64_t h = 0; h < 4; ++h) {
      for (int64_t j = 0; j < 8; ++j) {
        if (pair.forward->tile_bits[h] >> j & 1) continue;
        for (int64_t key = 64 * j; key < 64 * (j + 1); ++key) {
          for (int64_t d = 0; d < 40; ++d) {
            const int64_t at = d * element_bytes(dtype);
            const BackwardParams& b = pair.backward->params;
            ASSERT_EQ(load_element(dtype, access.key_row(b.gradients.dk, 0, key, h) + at), 0);
            ASSERT_EQ(load_element(dtype, access.key_row(b.gradients.dv, 0, key, h) + at), 0);
            store_element(dtype, access.key(0, key, h) + at, kNan);
            store_element(dtype, access.value(0, key, h) + at, kInf);
          }
        }
      }
    }
    EXPECT_EQ(pair.run(), before) << "a skipped tile was read";
  }
}

TEST_P(Backward, AnyNumberOfThreadsGivesTheSameBits) {
  for (Case c : skipping_cases()) {
    c.threads = 1;
    const std::vector<std::byte> one = gradients(c);
    for (const int threads : {1, 2, 3, 5, 0}) {
      c.threads = threads;
      EXPECT_EQ(gradients(c), one) << describe(c);
    }
  }
}

TEST_P(Backward, LayoutsAgreeBitForBit) {
  for (Case c : skipping_cases()) {
    const Pair dense(c);
    dense.backward->run();
    for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
      for (const int64_t padding : {0, 3}) {
        c.layout = layout, c.padding = padding;
        c.head_major = padding > 0, c.ragged_queries = padding > 0;
        const Pair other(c);
        other.backward->run();
        EXPECT_EQ(other.backward->dq(), dense.backward->dq()) << describe(c);
        EXPECT_EQ(other.backward->dk(), dense.backward->dk()) << describe(c);
        EXPECT_EQ(other.backward->dv(), dense.backward->dv()) << describe(c);
      }
    }
  }
}

TEST_P(Backward, ARequestDoesNotDependOnItsBatch) {
  for (Case c : skipping_cases()) {
    const Pair both(c);
    both.backward->run();
    c.requests.resize(1);
    const Pair alone(c);
    alone.backward->run();
    const auto begins = [](const std::vector<float>& all, const std::vector<float>& part) {
      return std::equal(part.begin(), part.end(), all.begin());
    };
    EXPECT_TRUE(begins(both.backward->dq(), alone.backward->dq())) << describe(c);
    EXPECT_TRUE(begins(both.backward->dk(), alone.backward->dk())) << describe(c);
    EXPECT_TRUE(begins(both.backward->dv(), alone.backward->dv())) << describe(c);
  }
}

TEST_P(Backward, RowsWithoutAKeyAndUnusedKeysGetZero) {
  Case c = sparse_case(BLASST_BFLOAT16);
  c.requests = {{80, 40}, {80, 0}, {80, 90}};  // causal: 40 rows and one request see nothing
  c.padding = 5;                               // as many unused keys a request
  c.sinks = true;
  const Pair pair(c);
  pair.backward->run();
  EXPECT_EQ(compare(*pair.backward).mismatch, "");
  const std::vector<float> dq = pair.backward->dq();
  const int64_t row = c.heads * c.head_dim;
  EXPECT_TRUE(std::all_of(dq.begin(), dq.begin() + 40 * row, [](float x) { return x == 0; }));
  EXPECT_TRUE(
      std::all_of(dq.begin() + 80 * row, dq.begin() + 160 * row, [](float x) { return x == 0; }));
  const BackwardParams& b = pair.backward->params;
  const Access access(pair.forward->params);
  for (int64_t request = 0; request < 3; ++request) {
    for (int64_t key = c.requests[request].keys; key < b.problem.kv.key_length; ++key) {
      for (int64_t d = 0; d < 40; ++d) {
        ASSERT_EQ(load_element(c.dtype, access.key_row(b.gradients.dk, request, key, 1) + 2 * d),
                  0);
        ASSERT_EQ(load_element(c.dtype, access.key_row(b.gradients.dv, request, key, 1) + 2 * d),
                  0);
      }
    }
  }
}

TEST_P(Backward, WhatIsNoKeyInAPageGetsZero) {
  Case c = sparse_case(BLASST_FLOAT32);
  c.requests = {{80, 40}, {80, 0}, {80, 90}};
  c.layout = Layout::kPaged, c.page_size = 16;
  const Pair pair(c);
  pair.backward->run();
  EXPECT_EQ(compare(*pair.backward).mismatch, "");
  const BackwardParams& b = pair.backward->params;
  const Access access(pair.forward->params);
  std::vector<const std::byte*> keys;
  for (int64_t request = 0; request < 3; ++request)
    for (int64_t key = 0; key < c.requests[request].keys; ++key)
      keys.push_back(access.key_row(b.gradients.dk, request, key, 1));
  int64_t others = 0;
  for (int64_t page = 0; page < b.problem.kv.pages; ++page) {
    for (int64_t token = 0; token < 16; ++token) {
      const std::byte* row = access.row_of(b.gradients.dk, page, token, 1);
      if (std::ranges::find(keys, row) != keys.end()) continue;
      ++others;
      for (int64_t d = 0; d < c.head_dim; ++d) ASSERT_EQ(load_element(c.dtype, row + 4 * d), 0);
    }
  }
  EXPECT_EQ(others, b.problem.kv.pages * 16 - 130);
}

TEST_P(Backward, ANumberThatARowMustNotSeeDoesNotReachIt) {
  for (const bool in_value : {false, true}) {
    for (const float bad : {kNan, kInf}) {
      Case c = sparse_case(BLASST_FLOAT32);
      c.requests = {{150, 150}};
      c.test = BLASST_TEST_NONE;
      const Pair clean(c);
      clean.backward->run();
      Pair pair(c);
      const Access access(pair.forward->params);
      std::byte* row = in_value ? access.value(0, 140, 0) : access.key(0, 140, 0);
      store_element(BLASST_FLOAT32, row, bad);
      pair.forward->run();
      pair.backward->run();
      const std::vector<float> before = clean.backward->dq(), after = pair.backward->dq();
      int64_t reached = 0;
      for (size_t i = 0; i < before.size(); ++i) {
        const size_t position = i / (4 * 64), head = i / 64 % 4;
        if (position < 140 || head >= 2)
          ASSERT_EQ(after[i], before[i]) << position << " " << head;
        else
          reached += !std::isfinite(after[i]);
      }
      EXPECT_GT(reached, 0);
    }
  }
}

TEST_P(Backward, AQueryThatCannotSeeAKeyDoesNotReachItsGradient) {
  Case c = sparse_case(BLASST_FLOAT32);
  c.requests = {{150, 150}};
  c.test = BLASST_TEST_NONE;
  const Pair clean(c);
  clean.backward->run();
  Pair pair(c);
  const Access access(pair.forward->params);
  store_element(BLASST_FLOAT32, access.query(0, 100, 1), kNan);
  store_element(BLASST_FLOAT32, access.query_row(pair.backward->params.gradients.dout, 0, 100, 1),
                kInf);
  pair.forward->run();
  pair.backward->run();
  for (const auto gradient : {&BackwardProblem::dk, &BackwardProblem::dv}) {
    const std::vector<float> before = (*clean.backward.*gradient)();
    const std::vector<float> after = (*pair.backward.*gradient)();
    const size_t dim = before.size() / 300;  // 150 keys of 2 heads
    for (size_t i = 0; i < before.size(); ++i) {
      if (i / dim / 2 > 100 || i / dim % 2 == 1) ASSERT_EQ(after[i], before[i]) << i / dim / 2;
    }
    EXPECT_FALSE(std::isfinite(after[0]));
  }
}

TEST_P(Backward, AWorkspaceOfTheStatedSizeIsEnough) {
  for (const Case& c : skipping_cases()) {
    SCOPED_TRACE(describe(c));
    const Pair pair(c);
    BackwardParams& params = pair.backward->params;
    expect_workspace_is_enough(params, backward_plan(params).workspace_bytes,
                               [&] { return pair.run(); });
  }
}

TEST_P(Backward, WorkspaceGrowsWithRowsAtMost) {
  Case c{.requests = {{512, 1024}}, .threads = 2};
  const auto needed = [](const Case& problem) {
    return static_cast<double>(backward_plan(Pair(problem).backward->params).workspace_bytes);
  };
  const double small = needed(c);
  c.requests = {{512, 8192}};
  EXPECT_LE(needed(c), small) << "keys must not count";
  c.requests = {{2048, 1024}};
  EXPECT_LE(needed(c), small * 4) << "rows, at most";
}

TEST_P(Backward, CallsFromSeveralThreadsAtOnce) {
  expect_the_same_at_once(skipping_cases(), gradients);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Backward, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

struct BadGradients {
  const char* name;
  std::function<void(BackwardProblem&)> spoil;
  std::vector<std::string> message;  // parts it must contain
  blasst_status status = BLASST_INVALID_ARGUMENT;
};

void PrintTo(const BadGradients& bad, std::ostream* os) { *os << bad.name; }

class BackwardValidation : public testing::TestWithParam<BadGradients> {};

TEST_P(BackwardValidation, SaysWhatIsWrongAndWritesNothing) {
  Case c = sparse_case(BLASST_FLOAT32);
  c.layout = Layout::kRagged;
  const Pair pair(c);
  BackwardProblem& b = *pair.backward;
  GetParam().spoil(b);
  try {
    b.run();
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), GetParam().status);
    for (const std::string& part : GetParam().message)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << error.what() << "\nlacks: " << part;
  }
  EXPECT_FALSE(b.wrote_anything());
}

INSTANTIATE_TEST_SUITE_P(
    Cpu, BackwardValidation,
    testing::Values(
        BadGradients{"NullLse", [](auto& b) { b.params.gradients.lse = nullptr; }, {"lse is null"}},
        BadGradients{"NullDout",
                     [](auto& b) { b.params.gradients.dout.data = nullptr; },
                     {"dout.data is null"}},
        BadGradients{
            "NullDq", [](auto& b) { b.params.gradients.dq.data = nullptr; }, {"dq.data is null"}},
        BadGradients{
            "NullDk", [](auto& b) { b.params.gradients.dk.data = nullptr; }, {"dk.data is null"}},
        BadGradients{
            "NullDv", [](auto& b) { b.params.gradients.dv.data = nullptr; }, {"dv.data is null"}},
        BadGradients{"SmallDk",
                     [](auto& b) { b.params.gradients.dk.elements -= 9; },
                     {"dk reaches element"}},
        BadGradients{"OverlappingDv",
                     [](auto& b) { b.params.gradients.dv.stride_head = 1; },
                     {"dv.stride_head is 1", "overlaps"}},
        BadGradients{"DqInQ",
                     [](auto& b) { b.params.gradients.dq = b.params.problem.q; },
                     {"dq and q share memory"}},
        BadGradients{"DvInDk",
                     [](auto& b) { b.params.gradients.dv.data = b.params.gradients.dk.data; },
                     {"dv and dk share memory"}},
        BadGradients{"DkInDout",
                     [](auto& b) { b.params.gradients.dout.data = b.params.gradients.dk.data; },
                     {"dk and dout"}},
        BadGradients{"SinkGradientWithoutSinks",
                     [](auto& b) { b.params.gradients.dsinks = b.dsinks.data(); },
                     {"dsinks is set but sinks is null"}},
        BadGradients{"Workspace",
                     [](auto& b) {
                       b.params.execution.workspace = b.dsinks.data(),
                       b.params.execution.workspace_bytes = 8;
                     },
                     {"workspace_bytes is 8", "needs"}},
        BadGradients{"Backend",
                     [](auto& b) { b.params.execution.backend = BLASST_BACKEND_CUDA; },
                     {"cuda"},
                     BLASST_UNSUPPORTED},
        BadGradients{
            "HeadDim", [](auto& b) { b.params.problem.head_dim = 12; }, {"head_dim is 12"}},
        BadGradients{"Pages",
                     [](auto& b) {
                       static const std::vector<int32_t> pages(1000, 0), lengths = {500, 230};
                       KeysValues& kv = b.params.problem.kv;
                       kv = {.layout = BLASST_LAYOUT_PAGED,
                             .k = kv.k,
                             .v = kv.v,
                             .lengths = lengths.data(),
                             .pages = 1,
                             .page_size = 1,
                             .page_table = pages.data(),
                             .page_table_stride = 500};
                     },
                     {"page 0 is used by requests 0 and 0", "used once"},
                     BLASST_UNSUPPORTED}),
    [](const auto& param) { return param.param.name; });

}  // namespace
}  // namespace blasst::check
