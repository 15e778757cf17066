// Compares what a call wrote with the reference, decision by decision.
#pragma once

#include <cstdint>
#include <string>

#include "testing/problem.h"

namespace blasst::check {

struct Comparison {
  std::string mismatch;   // empty: everything agrees
  int64_t decisions = 0;  // visited tiles
  int64_t rounded = 0;    // of them, decided otherwise than the reference, within rounding
  int64_t skipped = 0;
  double error = 0;        // largest error of an output row, relative to the row's largest element
  double plain_error = 0;  // the same of a plain implementation in the same type
};

// Roundings of a float32 score, each relative to the sum of its products' sizes at most: of the
// sum, the scale and, as it becomes a probability, the difference to the maximum or the LSE; with a
// soft cap also those of a hyperbolic tangent out of an exponential.
inline double score_roundings(float softcap) { return softcap > 0 ? 12 : 4; }

// After problem.run().
Comparison compare(const Problem& problem);

// The same, of outputs that came from elsewhere, with this plan. `sum_roundoff`: of
// one addition of products, relative to the sum of their sizes.
inline constexpr double kFloatRoundoff = 0x1p-24;
inline constexpr double kTensorCoreRoundoff = 0x1p-21;  // sums are cut, not rounded
inline constexpr double kFloat8Roundoff = 0x1p-13;  // those of float8_e4m3 on Hopper much sooner
Comparison compare(const Problem& problem, const Plan& plan, double sum_roundoff = kFloatRoundoff);

}  // namespace blasst::check
