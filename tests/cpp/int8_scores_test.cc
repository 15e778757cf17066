// Scores in int8, by the reference: the rotation, the rounding, how near they are to exact ones.
#include "testing/reference/int8_scores.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "testing/element.h"
#include "testing/problem.h"

namespace blasst::check {
namespace {

using reference::Int8Scores;
using reference::quantized;

constexpr TileShape kShape{.query_rows = 64, .keys = 64};

problem::Problem checked(const Problem& problem) {
  return problem::make_problem(problem.params, problem::Phase::kPrefill);
}

Case int8_case() {
  return {.seed = 3,
          .requests = {{70, 200}, {70, 130}},
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 64,
          .value_dim = 16,
          .causal = true,
          .scores = BLASST_SCORES_INT8};
}

TEST(Int8Scores, TheRotationIsTheHadamardMatrixOfTheLargestPowerOfTwoThatDivides) {
  for (const int64_t dim : {16, 24, 64, 80, 96, 128, 256}) {
    const int64_t block = reference::rotated_block(dim);
    EXPECT_EQ(dim % block, 0);
    EXPECT_EQ(dim / block % 2, 1);
    for (const int64_t at : {int64_t{0}, int64_t{5}, dim - 1}) {
      std::vector<float> x(dim);
      x[at] = 3;
      reference::rotate(x);
      for (int64_t i = 0; i < dim; ++i) {
        const bool minus = std::popcount(static_cast<uint64_t>(i & at & (block - 1))) % 2;
        EXPECT_EQ(x[i], i / block != at / block ? 0 : minus ? -3 : 3) << dim << " " << i;
      }
    }
  }
}

TEST(Int8Scores, RoundToTheNearestTiesToEven) {
  EXPECT_EQ(quantized(1, 1), 127);
  EXPECT_EQ(quantized(-1, 1), -127);
  EXPECT_EQ(quantized(2.5f, 127), 2);
  EXPECT_EQ(quantized(3.5f, 127), 4);
  EXPECT_EQ(quantized(-2.5f, 127), -2);
  EXPECT_EQ(quantized(2.6f, 127), 3);
  EXPECT_EQ(quantized(0, 0), 0);
  EXPECT_EQ(quantized(kNan, 1), 0);
  EXPECT_EQ(quantized(1, kNan), 0);
  EXPECT_EQ(quantized(kInf, kInf), 0);
  EXPECT_EQ(quantized(1, kInf), 0);
  EXPECT_EQ(quantized(1e-40f, 1e-40f), 127);  // whose inverse is infinite
}

// A vector with its mean taken off, rotated in double.
std::vector<double> rotated(const std::byte* row, DType dtype, std::span<const float> mean,
                            int64_t dim) {
  const int64_t block = reference::rotated_block(dim);
  std::vector<double> x(dim), y(dim);
  for (int64_t d = 0; d < dim; ++d)
    x[d] = load_element(dtype, row + d * element_bytes(dtype)) - (mean.empty() ? 0 : mean[d]);
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = i / block * block; j < (i / block + 1) * block; ++j)
      y[i] += (std::popcount(static_cast<uint64_t>(i & j & (block - 1))) % 2 ? -1 : 1) * x[j] /
              std::sqrt(static_cast<double>(block));
  return y;
}

double size_of(std::span<const double> x) {
  double sum = 0;
  for (const double e : x) sum += std::abs(e);
  return sum;
}

double largest_of(std::span<const double> x) {
  double most = 0;
  for (const double e : x) most = std::max(most, std::abs(e));
  return most;
}

TEST(Int8Scores, AreAsNearToExactOnesAsTheRoundingSays) {
  for (const int64_t dim : {64, 96, 128}) {
    for (const DType dtype : {BLASST_FLOAT32, BLASST_BFLOAT16, BLASST_FLOAT16}) {
      Case c = int8_case();
      c.dtype = dtype;
      c.head_dim = dim;
      const Problem problem(c);
      const problem::Problem p = checked(problem);
      const Int8Scores scores(p, kShape);
      const double scale = p.scale;
      for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t h = 0; h < p.heads; ++h) {
          const auto mean = scores.mean(b, h / 2);
          std::vector<std::vector<double>> keys;
          std::vector<double> units((p.requests[b].keys + 63) / 64);
          for (int64_t j = 0; j < p.requests[b].keys; ++j) {
            keys.push_back(rotated(p.key(b, j, h / 2), dtype, mean, dim));
            units[j / 64] = std::max(units[j / 64], largest_of(keys[j]) / 127);
          }
          for (int64_t i = 0; i < p.requests[b].rows; i += 7) {
            const auto q = rotated(p.query(b, i, h), dtype, {}, dim);
            const double unit = largest_of(q) / 127;
            for (int64_t j = 0; j < p.requests[b].keys; ++j) {
              double exact = 0, plain = 0, shift = 0;
              for (int64_t d = 0; d < dim; ++d) {
                const double x = load_element(dtype, p.query(b, i, h) + d * element_bytes(dtype));
                exact += q[d] * keys[j][d];
                plain += x * load_element(dtype, p.key(b, j, h / 2) + d * element_bytes(dtype));
                shift += x * mean[d];
              }
              ASSERT_NEAR(exact + shift, plain, 1e-5 * (1 + std::abs(plain)));
              const auto score = scores.at(b, i, h, j);
              const double key_unit = units[j / 64];
              const double allowed =
                  scale * (unit / 2 * size_of(keys[j]) + key_unit / 2 * size_of(q) +
                           static_cast<double>(dim) * unit * key_unit / 4);
              ASSERT_LE(std::abs(score.value() - scale * plain), 1.0001 * allowed + 1e-6);
              ASSERT_NEAR(score.unit, scale * unit * key_unit, 1e-5 * score.unit);
              ASSERT_NEAR(score.shift, scale * shift, 1e-5 * (1 + std::abs(shift)));
            }
          }
        }
      }
    }
  }
}

// Keys in int8 are taken as they are: nothing is taken off or rotated, queries neither.
TEST(Int8Scores, TakeKeysInInt8AsTheyAre) {
  for (const DType dtype : {BLASST_FLOAT32, BLASST_BFLOAT16}) {
    Case c = int8_case();
    c.dtype = dtype;
    c.k_dtype = BLASST_INT8;
    c.scales_per_head = c.scales_per_request = true;
    Problem problem(c);
    const Access access(problem.params);
    access.key(1, 90, 1)[7] = std::byte{0x80};
    const problem::Problem p = checked(problem);
    const Int8Scores scores(p, kShape);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (const float x : scores.mean(b, h / 2)) ASSERT_EQ(x, 0);
        for (int64_t i = 0; i < p.requests[b].rows; i += 7) {
          std::vector<double> q(c.head_dim);
          for (int64_t d = 0; d < c.head_dim; ++d)
            q[d] = load_element(dtype, p.query(b, i, h) + d * element_bytes(dtype));
          const double unit = largest_of(q) / 127;
          for (int64_t j = 0; j < p.requests[b].keys; ++j) {
            int64_t product = 0;
            for (int64_t d = 0; d < c.head_dim; ++d)
              product += std::llrint(q[d] / unit) * static_cast<int8_t>(p.key(b, j, h / 2)[d]);
            const auto score = scores.at(b, i, h, j);
            ASSERT_NEAR(static_cast<double>(score.product), static_cast<double>(product), 128);
            ASSERT_NEAR(score.unit, p.scale * unit * access.key_scale(b, h / 2), 1e-6 * score.unit);
            ASSERT_EQ(score.shift, 0);
          }
        }
      }
    }
  }
}

TEST(Int8Scores, AttentionIsNearExactAttention) {
  Case c = int8_case();
  const auto int8 = refer(Problem(c).params, false, kShape);
  c.scores = BLASST_SCORES_EXACT;
  const auto exact = refer(Problem(c).params, false, kShape);
  double off = 0;
  for (size_t i = 0; i < exact.lse.size(); ++i)
    if (std::isfinite(exact.lse[i])) off = std::max(off, std::abs(int8.lse[i] - exact.lse[i]));
  EXPECT_GT(off, 1e-5);  // it is another arithmetic
  EXPECT_LT(off, 0.1);   // of rows with one key
  ASSERT_EQ(int8.tiles.size(), exact.tiles.size());
  for (size_t i = 0; i < exact.tiles.size(); ++i)
    EXPECT_NEAR(int8.tiles[i].maximum, exact.tiles[i].maximum, 0.1);
}

TEST(Int8Scores, DoNotDependOnHowTensorsLie) {
  Case c = int8_case();
  c.requests = {{70, 200}, {90, 130}};
  c.ragged_queries = true;
  const auto wanted = refer(Problem(c).params, false, kShape);
  for (const Layout layout : {Layout::kRagged, Layout::kPaged}) {
    c.layout = layout;
    c.head_major = layout == Layout::kPaged;
    c.padding = 8;
    const auto got = refer(Problem(c).params, false, kShape);
    EXPECT_EQ(got.out, wanted.out);
    EXPECT_EQ(got.lse, wanted.lse);
  }
}

TEST(Int8Scores, WhatIsNotFiniteReachesItsRows) {
  Case c = int8_case();
  c.requests = {{200, 200}};
  for (const float odd : {kNan, kInf, -kInf}) {
    Problem problem(c);
    const Access access(problem.params);
    store_element(c.dtype, access.query(0, 150, 1) + 4 * 9, odd);
    store_element(c.dtype, access.key(0, 70, 1) + 4 * 3, odd);
    const problem::Problem p = checked(problem);
    const Int8Scores scores(p, kShape);
    EXPECT_TRUE(std::isnan(scores.at(0, 150, 1, 10).value()));
    EXPECT_TRUE(std::isfinite(scores.at(0, 149, 1, 10).value()));
    EXPECT_TRUE(std::isnan(scores.at(0, 100, 2, 70).value()));
    for (const int64_t key : {64, 69, 71, 128})  // the mean is of finite elements
      EXPECT_TRUE(std::isfinite(scores.at(0, 100, 2, key).value()));
    const auto result = refer(problem.params, false, kShape);
    const auto row = [&](int64_t i, int64_t h) { return result.out[(i * p.heads + h) * 16]; };
    EXPECT_TRUE(std::isnan(row(150, 1)));
    EXPECT_TRUE(std::isfinite(row(150, 0)));
    EXPECT_TRUE(std::isnan(row(75, 2)));
    EXPECT_TRUE(std::isfinite(row(69, 2)));
  }
}

TEST(Int8Scores, KeysThatAreAllAlikeScoreByTheirMeanAlone) {
  Case c = int8_case();
  c.requests = {{4, 100}};
  Problem problem(c);
  const Access access(problem.params);
  for (int64_t j = 0; j < 100; ++j)
    for (int64_t d = 0; d < 64; ++d)
      store_element(c.dtype, access.key(0, j, 0) + 4 * d, static_cast<float>(d % 5) - 1);
  const problem::Problem p = checked(problem);
  const auto score = Int8Scores(p, kShape).at(0, 2, 1, 50);
  EXPECT_EQ(score.product, 0);
  EXPECT_EQ(score.unit, 0);
  EXPECT_NE(score.shift, 0);
}

}  // namespace
}  // namespace blasst::check
