// Keys and values in 8 bits, of every instruction set.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "problem/element.h"
#include "promises.h"
#include "testing/backward.h"
#include "testing/compare.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

class Cache : public OnEveryIsa {};

constexpr DType kTypes[] = {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16};

struct Types {
  std::optional<DType> k, v;
};
const Types kCaches[] = {{BLASST_FLOAT8_E4M3, BLASST_FLOAT8_E4M3},
                         {BLASST_INT8, BLASST_INT8},
                         {BLASST_INT8, std::nullopt},
                         {std::nullopt, BLASST_FLOAT8_E4M3},
                         {BLASST_FLOAT8_E4M3, BLASST_INT8}};

Case cache_case(bool decode, DType dtype, Types types) {
  Case c = sparse_case(dtype);
  c.decode = decode;
  c.requests = {{70, 300}, {70, 130}};
  if (decode) c.requests = {{3, 700}, {3, 130}};
  c.k_dtype = types.k, c.v_dtype = types.v;
  return c;
}

TEST_P(Cache, AgreesWithTheReference) {
  int number = 0;
  for (const bool decode : {false, true}) {
    for (const Types& types : kCaches) {
      for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
        Case c = cache_case(decode, kTypes[number++ % 3], types);
        c.layout = layout;
        c.scales_per_head = layout != Layout::kDense;
        c.scales_per_request = layout == Layout::kPaged;
        Problem problem(c);
        problem.run();
        EXPECT_GT(skipped(problem), 0) << describe(c);
        EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
      }
    }
    ++number;  // so that a type does not go with one layout alone
  }
}

TEST_P(Cache, DecodeOfManySplitsAgreesWithTheReference) {
  for (const Types& types : kCaches) {
    Case c = cache_case(true, BLASST_BFLOAT16, types);
    c.requests = {{1, 6200}};
    c.softcap = 20, c.sinks = true;
    Problem problem(c);
    problem.run();
    EXPECT_GT(skipped(problem), 0) << describe(c);
    EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
  }
}

TEST_P(Cache, HasScoresInInt8) {
  for (const Types& types : kCaches) {
    for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
      Case c = cache_case(false, BLASST_BFLOAT16, types);
      c.scores = BLASST_SCORES_INT8;
      c.scales_per_head = true;
      c.layout = layout;
      c.padding = layout == Layout::kPaged ? 3 : 0;  // rows at any address
      if (layout == Layout::kRagged) c.softcap = 20, c.sinks = true;
      c.padded = layout == Layout::kDense;
      Problem problem(c);
      problem.run();
      EXPECT_GT(skipped(problem), 0) << describe(c);
      EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
    }
  }
}

// Keys in int8 are taken as they are, so that queries which lose nothing have exact scores.
TEST_P(Cache, OfInt8KeysHasExactScoresOfQueriesThatAreBytes) {
  for (const DType dtype : kTypes) {
    Case c = cache_case(false, dtype, {BLASST_INT8, std::nullopt});
    c.scales_per_head = true;
    c.scale = 0.01f;
    Problem exact(c);
    c.scores = BLASST_SCORES_INT8;
    Problem int8(c);
    for (Problem* problem : {&exact, &int8}) {
      const Access access(problem->params);
      for (int64_t b = 0; b < 2; ++b)
        for (int64_t i = 0; i < c.requests[b].queries; ++i)
          for (int64_t h = 0; h < c.heads; ++h)
            for (int64_t d = 0; d < c.head_dim; ++d)
              store_element(
                  dtype, access.query(b, i, h) + d * element_bytes(dtype),
                  static_cast<float>(d == 0 ? 127 : (i * 31 + h * 7 + d * 13) % 255 - 127));
      std::ranges::fill(problem->k_scales, 0.001f);
      problem->run();
    }
    for (size_t i = 0; i < exact.lse.size(); ++i)
      ASSERT_NEAR(int8.lse[i], exact.lse[i], 1e-5 * (1 + std::abs(exact.lse[i])));
    for (size_t i = 0; i < exact.tile_maxima.size(); ++i)
      if (std::isfinite(exact.tile_maxima[i]))
        ASSERT_NEAR(int8.tile_maxima[i], exact.tile_maxima[i],
                    1e-5 * (1 + std::abs(exact.tile_maxima[i])));
  }
}

// Every element of the keys, or of the values.
template <typename Visit>  // (element of the cache, the same of the other problem)
void for_elements(const Problem& cache, const Problem& other, bool keys, const Visit& visit) {
  const Access from(cache.params), to(other.params);
  const blasst_problem& p = cache.params.problem;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      for (int64_t j = 0; j < from.requests()[b].keys; ++j) {
        for (int64_t d = 0; d < (keys ? p.head_dim : p.value_dim); ++d) {
          const auto element = [&](const Problem& problem, const Access& access) {
            const KeysValues& kv = problem.params.problem.kv;
            return keys ? access.key(b, j, h) + d * element_bytes(kv.k.dtype)
                        : access.value(b, j, h) + d * element_bytes(kv.v.dtype);
          };
          visit(element(cache, from), element(other, to), b * 131 + h * 17 + j * 29 + d);
        }
      }
    }
  }
}

// Every pattern of 8 bits but NaN: a cache has the bits of the same numbers in the type of q.
TEST_P(Cache, HasTheBitsOfTheSameNumbersInTheTypeOfTheQueries) {
  for (const bool decode : {false, true}) {
    for (const DType dtype : kTypes) {
      for (const Types& types : kCaches) {
        Case c = cache_case(decode, dtype, types);
        Problem cache(c);
        c.k_dtype = c.v_dtype = {};
        Problem plain(c);
        for (const bool keys : {true, false}) {
          const DType stored =
              keys ? cache.params.problem.kv.k.dtype : cache.params.problem.kv.v.dtype;
          for_elements(cache, plain, keys, [&](std::byte* from, std::byte* to, int64_t i) {
            if (problem::is_8_bits(stored)) {
              *from = std::byte(i * 37 % 256);
              if (std::isnan(load_element(stored, from))) *from = std::byte{1};
            }
            store_element(dtype, to, static_cast<float>(load_element(stored, from)));
          });
        }
        // A scale of q.k multiplies the problem's.
        std::ranges::fill(cache.k_scales, 0.003f), std::ranges::fill(cache.v_scales, 1.0f);
        plain.params.problem.scale = 0.125f * (types.k ? 0.003f : 1);
        cache.run(), plain.run();
        EXPECT_EQ(cache.tile_bits, plain.tile_bits);
        EXPECT_EQ(cache.lse, plain.lse) << describe(cache.description);
        EXPECT_EQ(cache.dropped_mass_bound, plain.dropped_mass_bound);
        EXPECT_EQ(cache.gap_histogram, plain.gap_histogram);
        EXPECT_EQ(cache.tile_maxima, plain.tile_maxima);
        EXPECT_EQ(cache.out_bits(), plain.out_bits()) << describe(cache.description);
      }
    }
  }
}

TEST_P(Cache, LayoutsAndThreadsAgreeBitForBit) {
  for (const bool decode : {false, true}) {
    for (const Types& types : kCaches) {
      Case c = cache_case(decode, BLASST_FLOAT16, types);
      c.scales_per_head = c.scales_per_request = true;
      Problem wanted(c);
      wanted.run();
      for (const Layout layout : {Layout::kRagged, Layout::kPaged}) {
        c.layout = layout;
        c.threads = layout == Layout::kPaged ? 1 : 3;
        c.padding = 3;  // rows at any address
        c.head_major = layout == Layout::kPaged;
        Problem got(c);
        got.run();
        EXPECT_EQ(got.out_bits(), wanted.out_bits()) << describe(c);
        EXPECT_EQ(got.lse, wanted.lse) << describe(c);
        EXPECT_FALSE(got.wrote_elsewhere());
      }
    }
  }
}

TEST_P(Cache, NaNReachesTheRowsThatSeeItAndNoOthers) {
  for (const bool decode : {false, true}) {
    for (const bool in_keys : {true, false}) {
      Case c = cache_case(decode, BLASST_BFLOAT16, {BLASST_FLOAT8_E4M3, BLASST_FLOAT8_E4M3});
      c.test = BLASST_TEST_NONE;
      Problem problem(c);
      const Access access(problem.params);
      const int64_t last = access.requests()[0].keys - 1;  // which the last position alone sees
      (in_keys ? access.key(0, last, 1) : access.value(0, last, 1))[5] = std::byte{0xff};
      problem.run();
      EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
      const std::vector<float> out = problem.out();
      const auto at = [&](int64_t row, int64_t head) {
        return out[(row * c.heads + head) * c.value_dim + 5];
      };
      const int64_t rows = c.requests[0].queries;
      EXPECT_TRUE(std::isnan(at(rows - 1, 2)));
      EXPECT_TRUE(std::isfinite(at(rows - 1, 1)));
      EXPECT_TRUE(std::isfinite(at(rows - 2, 2)));
    }
  }
}

TEST_P(Cache, AWorkspaceOfTheStatedSizeIsEnough) {
  for (const bool decode : {false, true}) {
    for (const Types& types : kCaches) {
      Problem problem(cache_case(decode, BLASST_BFLOAT16, types));
      const size_t bytes = plan(problem.params, decode).workspace_bytes;
      expect_workspace_is_enough(problem.params, bytes, [&] {
        problem.run();
        return std::pair{problem.out_bits(), problem.lse};
      });
    }
  }
}

TEST_P(Cache, ValuesMayLieInKeys) {
  for (const DType type : {BLASST_INT8, BLASST_FLOAT8_E4M3}) {
    Case c = cache_case(true, BLASST_BFLOAT16, {type, type});
    c.kv_heads = 1, c.values_in_keys = true;
    Problem problem(c);
    problem.run();
    EXPECT_EQ(compare(problem).mismatch, "") << describe(c);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Cache, testing::ValuesIn(cpu_isas()),
                         [](const auto& info) { return info.param; });

TEST(CacheOfNoScales, CountsAsOfScalesOfOne) {
  Problem problem(cache_case(true, BLASST_FLOAT32, kCaches[0]));
  std::ranges::fill(problem.k_scales, 1.0f), std::ranges::fill(problem.v_scales, 1.0f);
  problem.run();
  const auto wanted = problem.out_bits();
  problem.params.problem.k_scales = problem.params.problem.v_scales = {};
  problem.run();
  EXPECT_EQ(problem.out_bits(), wanted);
}

TEST(CacheInBackward, IsRefusedByName) {
  for (const Types& types : kCaches) {
    Case c = cache_case(false, BLASST_BFLOAT16, {});
    Problem problem(c);
    problem.run();
    BackwardProblem backward(problem);
    KeysValues& kv = backward.params.problem.kv;
    kv.k.dtype = types.k.value_or(c.dtype), kv.v.dtype = types.v.value_or(c.dtype);
    const std::string named = types.k ? "k " : "v ";
    const std::string type = problem::dtype_name(types.k ? *types.k : *types.v);
    try {
      backward.run();
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), BLASST_UNSUPPORTED);
      EXPECT_NE(std::string(error.what()).find(named + type), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("backward"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace blasst::check
