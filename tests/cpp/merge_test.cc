// One attention from two over parts of the keys: against double precision, and bad input.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "testing/element.h"
#include "testing/problem.h"

namespace blasst::check {
namespace {

// Rows of one head of 16 elements, three a request.
View view(std::vector<float>& x) {
  return {.data = x.data(),
          .elements = std::ssize(x),
          .stride_request = 48,
          .stride_token = 16,
          .stride_head = 16};
}

// The keys [begin, end) of a dense problem of one request.
AttentionParams part_of(const AttentionParams& whole, int64_t begin, int64_t end) {
  AttentionParams p = whole;
  const int64_t bytes = element_bytes(p.problem.q.dtype);
  for (View* view : {&p.problem.kv.k, &p.problem.kv.v}) {
    view->data = static_cast<std::byte*>(view->data) + begin * view->stride_token * bytes;
    view->elements -= begin * view->stride_token;
  }
  p.problem.kv.key_length = end - begin;
  p.problem.kv.lengths = nullptr;
  p.report = {};
  return p;
}

TEST(Merge, OfTwoPartsIsTheWhole) {
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    for (const int64_t cut : {0, 1, 77, 300}) {
      Problem problem({.seed = 4,
                       .dtype = dtype,
                       .requests = {{50, 300}},
                       .heads = 4,
                       .kv_heads = 2,
                       .head_dim = 32,
                       .value_dim = 24,
                       .sinks = true});
      const Access access(problem.params);
      const int64_t elements = 50 * 4 * 24, cells = 50 * 4;
      std::vector<std::byte> parts[2], merged(elements * element_bytes(dtype));
      std::vector<float> lse[2], merged_lse(cells);
      View views[2];
      for (int i = 0; i < 2; ++i) {
        AttentionParams p = part_of(problem.params, i == 0 ? 0 : cut, i == 0 ? cut : 300);
        if (i == 1) p.problem.sinks = nullptr;
        parts[i].resize(merged.size()), lse[i].resize(cells);
        views[i] = p.problem.out = {.data = parts[i].data(),
                                    .dtype = dtype,
                                    .elements = elements,
                                    .stride_token = 4 * 24,
                                    .stride_head = 24};
        p.report.lse = lse[i].data();
        prefill(p);
      }
      MergeParams m{.query_length = 50, .heads = 4, .value_dim = 24};
      m.out_a = views[0], m.out_b = views[1], m.out = views[0], m.out.data = merged.data();
      m.lse_a = lse[0].data(), m.lse_b = lse[1].data(), m.lse = merged_lse.data();
      merge(m);

      const reference::Result wanted =
          refer(problem.params, false, prefill_plan(problem.params).shape);
      const double roundoff = std::max(unit_roundoff(dtype), 0x1p-20);
      for (int64_t row = 0; row < 50; ++row) {
        for (int64_t h = 0; h < 4; ++h) {
          EXPECT_NEAR(merged_lse[h * 50 + row], wanted.lse[h * 50 + row], 1e-4);
          for (int64_t d = 0; d < 24; ++d) {
            const int64_t at = (row * 4 + h) * 24 + d;
            EXPECT_NEAR(load_element(dtype, merged.data() + at * element_bytes(dtype)),
                        wanted.out[at], 8 * roundoff);
          }
        }
      }
    }
  }
}

TEST(Merge, RowsWithoutKeysAddNothing) {
  const float inf = INFINITY;
  const std::vector<float> lse_a = {-inf, 1, -inf}, lse_b = {2, -inf, -inf};
  std::vector<float> a(3 * 16, 5), b(3 * 16, 7), out(3 * 16, -1), lse(3);
  a[0] = NAN;  // of a row that has no share
  MergeParams p{.query_length = 3, .heads = 1, .value_dim = 16};
  p.out_a = view(a), p.out_b = view(b);
  p.out = view(out);
  p.lse_a = lse_a.data(), p.lse_b = lse_b.data(), p.lse = lse.data();
  merge(p);
  EXPECT_EQ(lse, (std::vector<float>{2, 1, -inf}));
  for (int d = 0; d < 16; ++d) {
    EXPECT_EQ(out[d], 7);
    EXPECT_EQ(out[16 + d], 5);
    EXPECT_EQ(out[32 + d], 0);
  }
  a[0] = 5;
  p.out = p.out_a;  // in place
  merge(p);
  EXPECT_EQ(a, out);
}

TEST(Merge, RejectsAndSaysWhy) {
  std::vector<float> a(96), b(96), out(96), lse_a(6), lse_b(6), lse(6);
  MergeParams good{.batch = 2, .query_length = 3, .heads = 1, .value_dim = 16};
  good.out_a = view(a), good.out_b = view(b);
  good.out = view(out);
  good.lse_a = lse_a.data(), good.lse_b = lse_b.data(), good.lse = lse.data();
  EXPECT_NO_THROW(merge(good));
  const std::vector<std::pair<std::function<void(MergeParams&)>, std::string>> cases = {
      {[](auto& p) { p.value_dim = 20; }, "value_dim is 20"},
      {[](auto& p) { p.out_b.dtype = static_cast<DType>(7); }, "out_b.dtype is 7"},
      {[](auto& p) { p.heads = 0; }, "heads is 0"},
      {[](auto& p) { p.query_length = -1; }, "query_length is -1"},
      {[](auto& p) { p.out_b.elements = 95; }, "out_b reaches element 96"},
      {[](auto& p) { p.out_a.data = nullptr; }, "out_a.data is null"},
      {[](auto& p) { p.out.stride_token = 8; }, "overlaps elements of out"},
      {[](auto& p) { p.out.data = static_cast<float*>(p.out_a.data) - 16; },
       "out and out_a share memory"},
      {[](auto& p) { p.lse_a = nullptr; }, "lse_a is null"},
      {[](auto& p) { p.lse = const_cast<float*>(p.lse_b); }, "lse and lse_b are the same"},
      {[](auto& p) { p.execution.backend = static_cast<Backend>(9); }, "backend is 9"}};
  for (const auto& [bend, says] : cases) {
    MergeParams p = good;
    bend(p);
    try {
      merge(p);
      ADD_FAILURE() << "accepted: " << says;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(says), std::string::npos) << error.what();
    }
  }
  good.query_length = 0;
  EXPECT_NO_THROW(merge(good));
}

}  // namespace
}  // namespace blasst::check
