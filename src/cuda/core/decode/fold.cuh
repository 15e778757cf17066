// Adding the results of splits. The attention kernel and the combining kernel use the very same
// operations, so it does not matter which of them adds two splits.
#pragma once

#include "cuda/core/math.cuh"

namespace blasst::cuda::decode {

// The weights of two results of one row, from their maxima.
struct FoldWeights {
  float maximum;  // of both
  float first, second;

  __device__ __forceinline__ FoldWeights(float first_maximum, float second_maximum,
                                         float log2_scale) {
    maximum = fmaxf(first_maximum, second_maximum);
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    first = exp2_approx(__fmul_rn(__fsub_rn(first_maximum, base), log2_scale));
    second = exp2_approx(__fmul_rn(__fsub_rn(second_maximum, base), log2_scale));
  }

  __device__ __forceinline__ float operator()(float a, float b) const {
    return __fmaf_rn(a, first, __fmul_rn(b, second));
  }
};

}  // namespace blasst::cuda::decode
