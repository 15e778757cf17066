// The comparison that all kernel tests lean on: does it notice?
#include "testing/compare.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>

#include "testing/element.h"

namespace blasst::check {
namespace {

Problem solved(bool decode) {
  Problem problem({.seed = 4,
                   .decode = decode,
                   .requests = {{10, 700}},
                   .inputs = Inputs::kDrift,
                   .causal = true,
                   .test = BLASST_TEST_RELATIVE,
                   .threshold = 0.1f});
  problem.run();
  return problem;
}

TEST(Compare, ARightResultAgreesAndSkipsSomething) {
  for (const bool decode : {false, true}) {
    const Comparison comparison = compare(solved(decode));
    EXPECT_EQ(comparison.mismatch, "");
    EXPECT_GT(comparison.skipped, 0);
    EXPECT_GT(comparison.decisions, comparison.skipped);
  }
}

TEST(Compare, EveryWrongOutputIsNoticed) {
  const std::pair<const char*, std::function<void(Problem&)>> slips[] = {
      {"out",
       [](Problem& p) {
         std::byte* at = Access(p.params).output(0, 3, 1);
         store_element(p.params.problem.q.dtype, at,
                       static_cast<float>(load_element(p.params.problem.q.dtype, at)) + 0.01f);
       }},
      {"lse", [](Problem& p) { p.lse[5] += 1e-3f; }},
      {"a bound that is too small",
       [](Problem& p) {
         for (float& bound : p.dropped_mass_bound) bound *= 0.9f;
       }},
      {"a tile counted twice", [](Problem& p) { ++p.tiles_visitable[0]; }},
      {"a skip that was not", [](Problem& p) { ++p.tiles_skipped[1]; }},
      {"a tile kept and one dropped", [](Problem& p) { p.tile_bits[0] ^= 0x3ff; }},
      {"a gap in another bin",
       [](Problem& p) {
         --p.gap_histogram[BLASST_GAP_BINS - 1];
         ++p.gap_histogram[3];
       }},
      {"another maximum", [](Problem& p) { p.tile_maxima[0] += 0.01f; }},
  };
  for (const bool decode : {false, true}) {
    for (const auto& [what, slip] : slips) {
      Problem problem = solved(decode);
      slip(problem);
      EXPECT_NE(compare(problem).mismatch, "") << what << (decode ? " (decode)" : " (prefill)");
    }
  }
}

}  // namespace
}  // namespace blasst::check
