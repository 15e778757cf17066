// Contracts at their edges, in prefill and decode on a GPU: rows without keys, thresholds that are
// none, tiles far above the running maximum, strides of 0, tensors that lie far apart.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

class SpecialOnGpu : public OnGpu, public testing::WithParamInterface<bool> {
 protected:
  bool decode() const { return GetParam(); }

  // Three requests of two KV heads with four query heads each.
  Case plain_case() const {
    const int64_t rows = decode() ? 2 : 200;
    return {.seed = 21,
            .decode = decode(),
            .dtype = BLASST_BFLOAT16,
            .requests = {{rows, 900}, {rows, 1500}, {rows, 700}},
            .heads = 8,
            .kv_heads = 2,
            .head_dim = 128,
            .value_dim = 128,
            .causal = true};
  }
};

std::string name_of(const testing::TestParamInfo<bool>& info) {
  return info.param ? "Decode" : "Prefill";
}
INSTANTIATE_TEST_SUITE_P(, SpecialOnGpu, testing::Bool(), name_of);

std::string mismatch_on_gpu(Problem& problem) { return run_and_compare(problem).mismatch; }

// --- rows without keys -------------------------------------------------------------------------

// A request without keys, and causal rows before every key.
TEST_P(SpecialOnGpu, RowsWithoutKeysHaveTheSinkAsLse) {
  for (const auto [qk, value] : gpu_kernels().sizes(decode())) {
    for (const bool sinks : {false, true}) {
      for (const TestKind test : {BLASST_TEST_NONE, BLASST_TEST_RELATIVE}) {
        Case c = plain_case();
        c.head_dim = qk, c.value_dim = value;
        const int64_t rows = decode() ? gpu_kernels().most_rows(qk) / 4 : 16;
        c.requests = {{rows, 0}, {rows, rows - 6}, {rows, 900}};
        c.sinks = sinks;
        c.test = test;
        c.threshold = 0.1f;
        Problem problem(c);
        DeviceProblem(problem, Reports::kCounts).run();
        const std::vector<float> out = problem.out();
        const Access access(problem.params);
        for (int64_t row = 0; row < 3 * rows; ++row) {
          const bool none = row < rows + 6;
          for (int64_t h = 0; h < c.heads; ++h) {
            const float lse = problem.lse[h * 3 * rows + row];
            if (none) {
              EXPECT_EQ(lse, sinks ? problem.sinks[h] : -kInf) << row;
              for (int64_t d = 0; d < value; ++d)
                EXPECT_EQ(out[(row * c.heads + h) * value + d], 0) << row;
            } else {
              EXPECT_TRUE(std::isfinite(lse)) << row;
            }
          }
        }
      }
    }
  }
}

// A sink may be the whole of the denominator, or nothing beside the scores.
TEST_P(SpecialOnGpu, SinksFarFromTheScores) {
  for (const float sink : {-3000.0f, -kInf, 60.0f, 200.0f, 3000.0f}) {
    Case c = plain_case();
    c.sinks = true;
    c.test = BLASST_TEST_RELATIVE;
    c.threshold = 0.1f;
    Problem problem(c);
    std::ranges::fill(problem.sinks, sink);
    EXPECT_EQ(mismatch_on_gpu(problem), "") << sink;
    if (sink == 3000) EXPECT_EQ(problem.lse[0], sink);
  }
}

// One part has no keys, but the sink: merged, it is the whole.
TEST_P(SpecialOnGpu, MergeKeepsTheSinkOfAPartWithoutKeys) {
  Case c = plain_case();
  c.sinks = true;
  Problem problem(c);
  DeviceProblem device(problem, Reports::kCounts);
  device.run();
  const std::vector<float> out = problem.out(), lse = problem.lse;

  const auto cells = static_cast<int64_t>(lse.size()),
             elements = device.params.problem.out.elements;
  DeviceMemory memory;
  const float* sinks = std::exchange(device.params.problem.sinks, nullptr);
  device.run();  // keys without the sink
  std::vector<std::byte> bytes(2 * elements);
  DeviceMemory::read(bytes.data(), device.params.problem.out.data, bytes.size());
  View keys_alone = device.params.problem.out;
  keys_alone.data = memory.copy(bytes.data(), bytes.size());
  const float* keys_lse = memory.copy(problem.lse.data(), cells);
  device.params.problem.sinks = sinks;
  DeviceProblem::put(device.params.problem.kv.lengths, std::vector<int32_t>(3, 0));
  device.run();  // the sink without keys
  for (int64_t i = 0; i < cells; ++i) EXPECT_EQ(problem.lse[i], problem.sinks[i * 8 / cells]);

  const AttentionParams& p = device.params;
  blasst::merge({.batch = 3,
                 .query_length = c.requests[0].queries,
                 .heads = c.heads,
                 .value_dim = c.value_dim,
                 .out_a = p.problem.out,
                 .out_b = keys_alone,
                 .lse_a = p.report.lse,
                 .lse_b = keys_lse,
                 .out = p.problem.out,
                 .lse = memory.copy(problem.lse.data(), cells),
                 .execution = {.backend = BLASST_BACKEND_CUDA}});
  device.download();
  const std::vector<float> merged = problem.out();
  float most = 0;
  for (const float x : out) most = std::max(most, std::abs(x));
  for (size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(merged[i], out[i], most * 0x1p-7);
}

// --- thresholds --------------------------------------------------------------------------------

// NaN, and below zero where a threshold is a probability: the bits of the test that skips nothing,
// which for relative tests are those of dense attention.
TEST_P(SpecialOnGpu, ThresholdsThatAreNoneSkipNothing) {
  for (const auto [qk, value] : gpu_kernels().sizes(decode())) {
    Case c = plain_case();
    c.head_dim = qk, c.value_dim = value;
    c.per_head = true;
    for (const TestKind test :
         {BLASST_TEST_RELATIVE, BLASST_TEST_SCALE_FACTOR, BLASST_TEST_ABSOLUTE}) {
      c.test = test;
      c.threshold = test == BLASST_TEST_RELATIVE ? 0.9f : 1e3f;
      Case all = c;
      if (test == BLASST_TEST_ABSOLUTE)
        all.threshold = -1e30f, all.per_head = false;
      else
        all.test = BLASST_TEST_NONE;
      Problem kept(all);
      DeviceProblem(kept).run();
      Problem problem(c);
      for (const Reports reports : {Reports::kCounts, Reports::kAll}) {
        DeviceProblem device(problem, reports);
        device.run();
        const std::vector<int64_t> skipped = problem.tiles_skipped;
        EXPECT_GT(*std::ranges::max_element(skipped), 0);
        for (const float value : {kNan, -0.5f, -kInf}) {
          if (test == BLASST_TEST_ABSOLUTE && value == -0.5f) continue;  // as good as any
          DeviceProblem::put(device.params.decision.test.values,
                             std::vector<float>(c.heads, value));
          device.run();
          EXPECT_EQ(problem.tiles_skipped, std::vector<int64_t>(skipped.size(), 0)) << value;
          EXPECT_TRUE(problem.out_bits() == kept.out_bits()) << test << ' ' << value;
          // Of the first head alone: in decode the heads of its KV head decide together.
          std::vector<float> values = problem.thresholds;
          values[0] = value;
          DeviceProblem::put(device.params.decision.test.values, values);
          device.run();
          for (size_t i = 0; i < skipped.size(); ++i) {
            const bool none = i % c.heads < (decode() ? 4 : 1);
            EXPECT_EQ(problem.tiles_skipped[i], none ? 0 : skipped[i]) << value << ' ' << i;
          }
        }
      }
    }
  }
}

// --- the absolute test -------------------------------------------------------------------------

// Every score of a key is score(key).
void set_scores(Problem& problem, const std::function<float(int64_t)>& score) {
  AttentionParams& p = problem.params;
  p.problem.scale = 1;
  const Access access(p);
  const auto fill = [&](std::byte* row, float first) {
    for (int64_t d = 0; d < p.problem.head_dim; ++d)
      store_element(p.problem.q.dtype, row + 2 * d, d == 0 ? first : 0);
  };
  for (int64_t b = 0; b < p.problem.batch; ++b) {
    for (int64_t i = 0; i < access.requests()[b].rows; ++i)
      for (int64_t h = 0; h < p.problem.heads; ++h) fill(access.query(b, i, h), 1);
    for (int64_t j = 0; j < access.requests()[b].keys; ++j)
      for (int64_t h = 0; h < p.problem.kv_heads; ++h) fill(access.key(b, j, h), score(j));
  }
}

// Above all scores: one tile is left to each row, the first that it sees.
TEST_P(SpecialOnGpu, AbsoluteTestNeverSkipsTheFirstVisitedTile) {
  for (const Order order : {BLASST_FORWARD, BLASST_REVERSE, BLASST_SINK_FIRST}) {
    for (const int64_t window : {-1, 0, 40, 1000}) {
      for (const float threshold : {1e9f, kInf}) {
        Case c = plain_case();
        const int64_t rows = decode() ? 16 : 200;
        c.requests = {{rows, 3000}, {rows, 70}, {rows, 1}};
        c.kv_heads = 8;
        c.order = order;
        c.window_left = window;
        c.test = BLASST_TEST_ABSOLUTE;
        c.threshold = threshold;
        Problem problem(c);
        EXPECT_EQ(mismatch_on_gpu(problem), "") << order << ' ' << window;
        for (size_t i = 0; i < problem.tiles_skipped.size(); ++i)
          EXPECT_LT(problem.tiles_skipped[i], problem.tiles_visitable[i]);
        const Access access(problem.params);
        for (int64_t b = 0; b < 3; ++b)
          for (int64_t i = std::max<int64_t>(0, rows - c.requests[b].keys); i < rows; ++i)
            EXPECT_TRUE(std::isfinite(problem.lse[access.requests()[b].first_row + i]));
      }
    }
  }
}

// Scores rise by `gap` behind the first tile, which alone is kept; and fall back at the end, or
// rise above all.
TEST_P(SpecialOnGpu, BoundOfTilesFarAboveTheMaximum) {
  for (const int64_t keys : {400, 4000}) {
    for (const float gap : {8.0f, 50.0f, 80.0f, 100.0f, 150.0f, 300.0f}) {
      for (const float last : {-gap, 2 * gap}) {
        Case c = plain_case();
        c.causal = false;
        c.order = BLASST_FORWARD;
        c.requests = {{2, keys}};
        c.test = BLASST_TEST_ABSOLUTE;
        c.threshold = 1;
        Problem problem(c);
        set_scores(problem, [&](int64_t j) { return j < 128 ? -gap : j < keys - 130 ? 0 : last; });
        EXPECT_EQ(mismatch_on_gpu(problem), "") << keys << ' ' << gap << ' ' << last;
        for (const float bound : problem.dropped_mass_bound) {
          EXPECT_LE(bound, 1);
          if (last < 0) EXPECT_GE(bound, 0.999f) << keys << ' ' << gap;
          if (last > 0 && gap >= 50) EXPECT_LT(bound, 1e-6f) << keys << ' ' << gap;
        }
      }
    }
  }
}

// --- tensors -----------------------------------------------------------------------------------

// A stride of 0: all requests, all heads or all tokens are one.
TEST_P(SpecialOnGpu, StridesOfZero) {
  const auto set = [](AttentionParams& p, int64_t View::*stride, bool keys) {
    if (keys)
      p.problem.kv.k.*stride = p.problem.kv.v.*stride = 0;
    else
      p.problem.q.*stride = 0;
  };
  for (const int64_t View::*stride :
       {&View::stride_request, &View::stride_token, &View::stride_head}) {
    for (const bool keys : {false, true}) {
      for (const Layout layout : {Layout::kDense, Layout::kPaged, Layout::kRagged}) {
        Case c = plain_case();
        const int64_t rows = decode() ? 2 : 70;
        c.requests = {{rows, 500}, {rows, 500}};  // nothing that is no key is read
        c.layout = layout;
        c.page_size = 32;
        c.test = BLASST_TEST_RELATIVE;
        c.threshold = 0.05f;
        Problem problem(c);
        set(problem.params, const_cast<int64_t View::*>(stride), keys);
        EXPECT_EQ(mismatch_on_gpu(problem), "") << describe(c) << ' ' << keys;
      }
    }
  }
}

// More than 2^31 elements between the requests, then between the heads, of all tensors.
TEST_P(SpecialOnGpu, TensorsOfMoreThanTwoToThe31Elements) {
  constexpr int64_t kFar = (int64_t{1} << 31) + 4096;
  Case c = plain_case();
  c.requests = {{c.requests[0].queries, 300}, {c.requests[0].queries, 300}};
  c.heads = c.kv_heads = 2;
  c.test = BLASST_TEST_RELATIVE;
  c.threshold = 0.05f;
  for (const bool by_head : {false, true}) {
    Problem problem(c);
    DeviceProblem device(problem, Reports::kCounts);
    device.run();
    const std::vector<std::byte> wanted = problem.out_bits();

    AttentionParams& p = device.params;
    View* views[] = {&p.problem.q, &p.problem.kv.k, &p.problem.kv.v, &p.problem.out};
    const View near_out = p.problem.out;
    DeviceMemory memory;
    // The inputs lie between each other's halves, the output has a buffer of its own.
    int64_t room = 0;
    for (const View* view : views) room += view->elements + 64;
    auto* at = static_cast<std::byte*>(memory.allocate(2 * (kFar + room)));
    const auto copy = [&](std::byte* to, const std::byte* from, int64_t elements) {
      must(cudaMemcpy(to, from, 2 * elements, cudaMemcpyDeviceToDevice));
    };
    for (View* view : views) {
      if (view == &p.problem.out) at = static_cast<std::byte*>(memory.allocate(2 * (kFar + room)));
      // All of it twice; a half of each is used.
      const auto* data = static_cast<const std::byte*>(view->data);
      const int64_t elements = view->elements;
      int64_t& stride = by_head ? view->stride_head : view->stride_request;
      copy(at, data, elements);
      copy(at + 2 * kFar, data + 2 * stride, elements - stride);
      stride = kFar;
      view->data = at;
      view->elements += kFar;
      at += (2 * elements + 127) / 128 * 128;
    }
    device.launch();
    synchronize();
    const View& out = p.problem.out;
    auto* back = static_cast<std::byte*>(near_out.data);
    must(cudaMemset(back, 0xff, 2 * near_out.elements));
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t i = 0; i < p.problem.query_length; ++i) {
        for (int64_t h = 0; h < 2; ++h) {
          const auto offset = [&](const View& v) {
            return 2 * (b * v.stride_request + i * v.stride_token + h * v.stride_head);
          };
          copy(back + offset(near_out), static_cast<std::byte*>(out.data) + offset(out),
               p.problem.value_dim);
        }
      }
    }
    p.problem.out = near_out;
    device.download();
    EXPECT_EQ(problem.out_bits(), wanted) << by_head;
  }
}

}  // namespace
}  // namespace blasst::check
