// Scores of any size, skipped tiles far above what is kept, rows that have only a sink.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "promises.h"
#include "testing/backward.h"
#include "testing/compare.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

class Numerics : public OnEveryIsa {
 protected:
  // Element 0 of every query is `query`, of key j `key(j)`; all others are 0, so that every score
  // is one product.
  static void set_scores(Problem& p, float query, const std::function<float(int64_t)>& key) {
    const Access access(p.params);
    const auto fill = [&](std::byte* row, float value) {
      for (int64_t d = 0; d < p.params.problem.head_dim; ++d)
        store_element(p.params.problem.q.dtype, row + d * element_bytes(p.params.problem.q.dtype),
                      d ? 0 : value);
    };
    for (int64_t b = 0; b < p.params.problem.batch; ++b) {
      for (int64_t i = 0; i < access.requests()[b].rows; ++i)
        for (int64_t h = 0; h < p.params.problem.heads; ++h) fill(access.query(b, i, h), query);
      for (int64_t j = 0; j < access.requests()[b].keys; ++j)
        for (int64_t h = 0; h < p.params.problem.kv_heads; ++h) fill(access.key(b, j, h), key(j));
    }
  }
};

// The largest numbers that come about in practice: float16 clamped at its end, products up to where
// float32 ends.
TEST_P(Numerics, HugeScoresChooseTheirLargestKey) {
  const std::pair<DType, float> largest[] = {{BLASST_FLOAT16, 65504},  {BLASST_FLOAT32, 1e5f},
                                             {BLASST_FLOAT32, 1e10f},  {BLASST_FLOAT32, 1e18f},
                                             {BLASST_BFLOAT16, 1e10f}, {BLASST_BFLOAT16, 1e18f}};
  for (const auto& pair : largest) {
    const DType dtype = pair.first;  // clang's lambdas take no structured bindings before 16
    const float most = pair.second;
    for (const bool decode : {false, true}) {
      for (const float threshold : {0.0f, 0.5f}) {
        Problem p({.decode = decode,
                   .dtype = dtype,
                   .requests = {{decode ? 3 : 70, decode ? 9000 : 300}},
                   .sinks = true,
                   .test = BLASST_TEST_RELATIVE,
                   .threshold = threshold});
        // Two keys in different tiles share the maximum.
        set_scores(p, most, [&](int64_t j) { return j == 77 || j == 150 ? most : -most; });
        p.run();
        const Access access(p.params);
        const std::vector<float> out = p.out();
        for (int64_t row = 0; row < access.rows(); ++row) {
          for (int64_t h = 0; h < p.params.problem.heads; ++h) {
            for (int64_t d = 0; d < p.params.problem.value_dim; ++d) {
              const auto value = [&](int64_t j) {
                return load_element(dtype, access.value(0, j, 0) + d * element_bytes(dtype));
              };
              const double wanted = (value(77) + value(150)) / 2;
              ASSERT_NEAR(out[(row * p.params.problem.heads + h) * p.params.problem.value_dim + d],
                          wanted, 2 * unit_roundoff(dtype) * (1 + std::abs(wanted)))
                  << describe(p.description);
            }
            const double score = static_cast<double>(rounded(dtype, most)) * rounded(dtype, most) *
                                 (1 / std::sqrt(static_cast<float>(p.params.problem.head_dim)));
            ASSERT_NEAR(p.lse[h * access.rows() + row], score, 0x1p-23 * score)
                << describe(p.description);
          }
        }
      }
    }
  }
}

// Scores that float32 holds exactly, so far from zero that their LSE is rounded to 1/32 or, at the
// far end, to 2^8.
TEST_P(Numerics, GradientsOfLargeScoresKeepTheirDigits) {
  for (const float base : {1024.0f, 0x1p19f, -0x1p19f, 0x1p32f}) {
    for (const bool sinks : {false, true}) {
      Problem p({.requests = {{70, 150}}, .kv_heads = 2, .scale = 1, .sinks = sinks});
      const float step = std::max(std::abs(base) * 0x1p-23f, 0.125f);
      set_scores(p, 1, [&](int64_t j) { return base + step * static_cast<float>(j % 31); });
      for (float& sink : p.sinks) sink = base;
      p.run();
      BackwardProblem b(p);
      b.params.gradients.dlse = b.dlse.data();
      b.run();
      const reference::Gradients wanted =
          reference::backward(b.params, prefill_plan(p.params).shape);
      const auto expect_near = [&](const std::vector<float>& got, const std::vector<double>& exact,
                                   const char* name) {
        double error = 0, size = 0;
        for (size_t i = 0; i < exact.size(); ++i) {
          error += (got[i] - exact[i]) * (got[i] - exact[i]);
          size += exact[i] * exact[i];
        }
        EXPECT_LE(std::sqrt(error), 1e-5 * std::sqrt(size)) << name << " at " << base;
      };
      expect_near(b.dv(), wanted.dv, "dv");
      expect_near(b.dk(), wanted.dk, "dk");
      if (sinks) expect_near(b.dsinks, wanted.dsinks, "dsinks");
    }
  }
}

// An LSE that includes other keys, as merge gives it, is taken as it is.
TEST_P(Numerics, AnLseOverMoreKeysIsNotCorrected) {
  Problem p({.requests = {{70, 150}}, .scale = 1});
  set_scores(p, 1, [&](int64_t j) { return 0x1p13f + 0.125f * static_cast<float>(j % 31); });
  p.run();
  BackwardProblem b(p);
  b.run();
  const std::vector<float> alone = b.dv();
  for (float& lse : p.lse) lse += 1;
  b.run();
  const std::vector<float> shared = b.dv();
  for (size_t i = 0; i < alone.size(); ++i)
    ASSERT_NEAR(shared[i], alone[i] * std::exp(-1.0f), 2e-3 * (std::abs(alone[i]) + 1e-3));
}

TEST_P(Numerics, TheSoftCapsSlopeKeepsItsDigits) {
  for (const float ratio : {0.01f, 1.0f, 5.0f, 9.0f, 15.0f}) {
    Problem p({.requests = {{64, 64}}, .scale = 1, .softcap = 2});
    set_scores(p, 1, [&](int64_t j) { return 2 * ratio + 0x1p-6f * static_cast<float>(j); });
    p.run();
    BackwardProblem b(p);
    b.run();
    const reference::Gradients wanted = reference::backward(b.params, prefill_plan(p.params).shape);
    const std::vector<float> dk = b.dk();
    double largest = 0;
    for (const double x : wanted.dk) largest = std::max(largest, std::abs(x));
    ASSERT_GT(largest, 0);
    for (size_t i = 0; i < dk.size(); ++i)
      ASSERT_NEAR(dk[i], wanted.dk[i], 2e-4 * largest) << "at ratio " << ratio;
  }
}

TEST_P(Numerics, SubnormalNumbersAreKept) {
  for (const DType dtype : {BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16}) {
    for (const bool decode : {false, true}) {
      Problem p({.decode = decode, .dtype = dtype, .requests = {{3, 1}}});
      const float subnormal = dtype == BLASST_FLOAT16 ? 0x1p-20f : 0x1p-130f;
      const Access access(p.params);
      for (int64_t d = 0; d < p.params.problem.value_dim; ++d)
        store_element(dtype, access.value(0, 0, 0) + d * element_bytes(dtype), subnormal);
      p.run();
      // The header says so.
      const bool lost = dtype == BLASST_BFLOAT16 && GetParam() == "avx512_bf16";
      for (const float x : p.out()) ASSERT_EQ(x, lost ? 0 : subnormal) << describe(p.description);
    }
  }
}

// The absolute test drops a tile although it lies far above the running maximum.
TEST_P(Numerics, TheBoundHoldsForTilesFarAboveTheRunningMaximum) {
  for (const float gap : {1.0f, 50.0f, 80.0f, 100.0f, 150.0f, 300.0f, 1e4f, 1e9f}) {
    for (const bool decode : {false, true}) {
      Problem p({.decode = decode,
                 .requests = {{decode ? 3 : 64, 9000}},
                 .scale = 1,
                 .order = BLASST_FORWARD,
                 .test = BLASST_TEST_ABSOLUTE,
                 .threshold = 5});
      // The first tile is kept, low as it is; then tiles ever higher, all below the threshold.
      set_scores(p, 1, [&](int64_t j) {
        const auto tile = static_cast<float>(j / 64);
        return j < 64 ? -gap : 4 - gap / 2 * std::max(0.0f, 1 - tile / 100);
      });
      p.run();
      EXPECT_EQ(compare(p).mismatch, "") << gap << " " << describe(p.description);
      const reference::Result wanted = refer(p.params, decode, plan(p.params, decode).shape);
      for (size_t i = 0; i < p.lse.size(); ++i) {
        ASSERT_EQ(p.tiles_skipped[0], p.tiles_visitable[0] - 1);
        ASSERT_GE(p.dropped_mass_bound[i], wanted.dropped_mass[i] * (1 - 1e-5)) << gap;
        ASSERT_LE(p.dropped_mass_bound[i], 1) << gap;
      }
    }
  }
}

TEST_P(Numerics, TheFirstVisitedTileIsKeptWhereverItLies) {
  for (const TestKind test : {BLASST_TEST_ABSOLUTE, BLASST_TEST_RELATIVE}) {
    for (const Order order : {BLASST_FORWARD, BLASST_REVERSE, BLASST_SINK_FIRST}) {
      for (const int64_t first : {0, 62, 63, 64, 70, 127, 128, 169}) {  // splits have 64 tiles
        Problem p({.decode = true,
                   .requests = {{2, 170 * 64}},
                   .blocks = true,
                   .order = order,
                   .test = test,
                   .threshold = test == BLASST_TEST_ABSOLUTE ? 1e9f : 1.0f});
        std::ranges::fill(p.blocks, 0);
        const auto tile_at = [&](int64_t i) -> int64_t {
          return order == BLASST_FORWARD   ? i
                 : order == BLASST_REVERSE ? 169 - i
                 : i == 0                  ? 0
                                           : 170 - i;
        };
        for (int64_t i = first; i < 170; ++i) p.blocks[tile_at(i)] = 1;
        p.run();
        EXPECT_EQ(compare(p).mismatch, "") << describe(p.description);
        EXPECT_TRUE(p.tile_bits[tile_at(first) / 32] >> (tile_at(first) % 32) & 1)
            << first << " " << describe(p.description);
        for (const float lse : p.lse) ASSERT_TRUE(std::isfinite(lse));
      }
    }
  }
}

// However a row comes to have no key: its output is 0, its LSE the sink.
TEST_P(Numerics, ARowWithoutAKeyKeepsItsSink) {
  const std::pair<const char*, std::function<void(Case&)>> ways[] = {
      {"no keys",
       [](Case& c) {
         c.requests = {{3, 0}};
       }},
      {"causal",
       [](Case& c) {
         c.requests = {{16, 3}}, c.causal = true;
       }},
      {"a window that has left",
       [](Case& c) {
         c.requests = {{16, 3}}, c.window_right = 2;
       }},
      {"bands",
       [](Case& c) {
         c.requests = {{9, 300}}, c.bands = true;
       }},
      {"blocks",
       [](Case& c) {
         c.requests = {{9, 300}}, c.blocks = true;
       }},
      {"scores of -inf", [](Case& c) {
         c.requests = {{9, 300}};
       }}};
  for (const auto& [way, change] : ways) {
    for (const bool decode : {false, true}) {
      for (const bool sinks : {false, true}) {
        Case c{.decode = decode, .heads = 4, .kv_heads = 2, .sinks = sinks};
        change(c);
        Problem p(c);
        for (int64_t& distance : p.bands) distance = 1000;
        std::ranges::fill(p.blocks, 0);
        if (way == std::string("scores of -inf")) set_scores(p, 1, [](int64_t) { return -kInf; });
        p.run();
        EXPECT_EQ(compare(p).mismatch, "") << way;
        const Access access(p.params);
        const std::vector<float> out = p.out();
        for (int64_t h = 0; h < c.heads; ++h) {
          const size_t at = h * access.rows();  // row 0, which has no key in any of these
          ASSERT_EQ(p.lse[at], sinks ? p.sinks[h] : -kInf) << way;
          ASSERT_EQ(p.dropped_mass_bound[at], 0) << way;
          for (int64_t d = 0; d < c.value_dim; ++d) ASSERT_EQ(out[h * c.value_dim + d], 0) << way;
        }
        if (decode) continue;
        BackwardProblem b(p);
        b.params.gradients.dlse = b.dlse.data();
        b.run();
        EXPECT_EQ(compare(b).mismatch, "") << way;
        if (way != std::string("no keys")) continue;
        for (int64_t h = 0; sinks && h < c.heads; ++h)
          EXPECT_NEAR(b.dsinks[h], b.dlse[3 * h] + b.dlse[3 * h + 1] + b.dlse[3 * h + 2], 1e-6);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Numerics, testing::ValuesIn(cpu_isas()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace blasst::check
