// The tile test.
#pragma once

#include <cfloat>
#include <cmath>

#include "blasst/blasst.h"
#include "cuda/core/host_device.h"

namespace blasst::cuda {

// What a row's maximum in a tile (absolute test) or its distance from the running maximum (relative
// tests) must stay below for a skip, as a natural logarithm. A value that is no threshold skips
// nothing: -inf. test: blasst_test; keys: of the request.
BLASST_HOST_DEVICE float log_threshold(int test, float value, int keys) {
  if (test == BLASST_TEST_NONE) return -INFINITY;
  if (test == BLASST_TEST_ABSOLUTE) return std::isnan(value) ? -INFINITY : value;
  if (test == BLASST_TEST_SCALE_FACTOR) value /= static_cast<float>(keys);
  return value > 0 ? std::log(std::fmin(value, 1.0f)) : -INFINITY;  // false for NaN, too
}

// What a row's maximum in a tile must stay below for a skip; the threshold as scores are kept. A
// row without a score so far allows a skip only where it has none in the tile either: -inf <
// -FLT_MAX.
BLASST_HOST_DEVICE float skip_below(int test, float threshold, float running_maximum) {
  const bool alone = test == BLASST_TEST_ABSOLUTE && running_maximum != -INFINITY;
  return std::fmax(alone ? threshold : running_maximum + threshold, -FLT_MAX);
}

}  // namespace blasst::cuda
