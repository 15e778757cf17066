// The upper bound on the probabilities of skipped tiles.
#pragma once

#include <cmath>

#include "cuda/core/math.cuh"

namespace blasst::cuda {

// Of one row: sum * 2^maximum is an upper bound on the exponentials of skipped scores. It has a
// maximum of its own: the absolute test skips tiles that lie far above all that was kept, too.
struct SkippedMass {
  float maximum, sum;

  static __device__ __forceinline__ SkippedMass none() { return {-INFINITY, 0}; }

  __device__ __forceinline__ void add(float other_maximum, float other_sum) {
    const float both = fmaxf(maximum, other_maximum);
    if (both == -INFINITY) return;
    sum = sum * exp2_approx(maximum - both) + other_sum * exp2_approx(other_maximum - both);
    maximum = both;
  }
  __device__ __forceinline__ void add(const SkippedMass& other) { add(other.maximum, other.sum); }

  // Its part of all, beside the kept exponentials: kept_sum * 2^kept_maximum.
  __device__ __forceinline__ float share(float kept_maximum, float kept_sum) const {
    return sum == 0 ? 0.0f : 1 / (1 + kept_sum / sum * exp2_approx(kept_maximum - maximum));
  }
};

}  // namespace blasst::cuda
