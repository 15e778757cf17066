// Online softmax over the tiles that a query tile keeps.
#pragma once

#include "cuda/core/fragment.cuh"
#include "cuda/core/math.cuh"

namespace blasst::cuda {

// Of a thread's two rows (fragment.cuh). Maxima are of raw scores; times score_to_log2 they are
// base-2 logarithms.
struct OnlineSoftmax {
  float score_to_log2;
  float maximum[2];  // running
  float sum[2];      // of this thread's keys

  static __device__ __forceinline__ OnlineSoftmax empty(float score_to_log2) {
    return {score_to_log2, {-INFINITY, -INFINITY}, {0, 0}};
  }

  // The running maximum as a base-2 logarithm; 0 if there is none.
  __device__ __forceinline__ float log2_maximum(int r) const {
    return maximum[r] == -INFINITY ? 0.f : __fmul_rn(maximum[r], score_to_log2);
  }

  // Moves the running maxima to those of a kept tile. What was summed under the old ones is to be
  // scaled with alpha; returns whether that changes anything in the warp.
  __device__ __forceinline__ bool raise(const float (&tile_maximum)[2], float (&alpha)[2]) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float old = maximum[r];
      maximum[r] = fmaxf(old, tile_maximum[r]);
      moved |= maximum[r] != old;
      alpha[r] = exp2_approx(__fmul_rn(old, score_to_log2) - log2_maximum(r));
    }
    return __any_sync(kAllLanes, moved);
  }
};

// The same, where the maxima's logarithms change only as the maxima do. Then the assembler cannot
// take exponentials before the branch that scales, apart from the additions and conversions that
// hide in them. Faster where nothing else stands between scores and exponentials; behind the vote
// of a tile test, and where a warp waits for its products (mma.sync), up to 4 % slower.
struct OnlineSoftmaxApart : OnlineSoftmax {
  float log2_maxima[2];

  static __device__ __forceinline__ OnlineSoftmaxApart empty(float score_to_log2) {
    return {OnlineSoftmax::empty(score_to_log2), {0, 0}};
  }

  __device__ __forceinline__ float log2_maximum(int r) const { return log2_maxima[r]; }

  __device__ __forceinline__ bool raise(const float (&tile_maximum)[2], float (&alpha)[2]) {
    const float old[2] = {maximum[0], maximum[1]};
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maximum[r] = fmaxf(old[r], tile_maximum[r]);
      moved |= maximum[r] != old[r];
      alpha[r] = 1;
    }
    if (!__any_sync(kAllLanes, moved)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      log2_maxima[r] = OnlineSoftmax::log2_maximum(r);
      alpha[r] = exp2_approx(__fmul_rn(old[r], score_to_log2) - log2_maxima[r]);
    }
    return true;
  }
};

// raise(), and scales: `sum` and the outputs.
template <typename Softmax, int kOutputs>
__device__ __forceinline__ void move_maxima(Softmax& softmax, const float (&tile_maximum)[2],
                                            float (&o)[kOutputs]) {
  float alpha[2];
  if (!softmax.raise(tile_maximum, alpha)) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) softmax.sum[r] *= alpha[r];
  scale_rows(o, alpha);
}

// Probabilities, in the element type, from the scores of a tile, or of kCount of its halves from
// kFirst on. Each half has sums of its own: the assembler orders that better than one.
template <typename Element, int kFirst = 0, int kCount = 2, typename Softmax, int kScores>
__device__ __forceinline__ void exponentials(Softmax& softmax, const float (&s)[kScores],
                                             uint32_t (&p)[kScores / 2]) {
  constexpr int kHalf = kScores / 2;
  const float minus_maximum[2] = {-softmax.log2_maximum(0), -softmax.log2_maximum(1)};
#pragma unroll
  for (int half = kFirst; half < kFirst + kCount; ++half) {
    float sums[2][2] = {};
#pragma unroll
    for (int j = 0; j < kHalf / 4; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = exp2_approx(
              fmaf(s[half * kHalf + 4 * j + 2 * r + e], softmax.score_to_log2, minus_maximum[r]));
          sums[r][e] += x[e];
        }
        p[half * kHalf / 2 + 2 * j + r] = pack2<Element>(x[0], x[1]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax.sum[r] += sums[r][0] + sums[r][1];
  }
}

// A row at its end: what its sums are multiplied with, its LSE, and the denominator
// sum * 2^maximum, the sink in it.
struct RowEnd {
  float weight, lse;
  float maximum, sum;
};

// sum: of all the row's keys. sink: null: none. The LSE only where it is wanted: it takes longer
// than all else.
__device__ __forceinline__ RowEnd finish_row(float log2_maximum, float sum, bool empty,
                                             const float* sink, bool wants_lse) {
  if (empty) return {0, sink ? *sink : -INFINITY, 0, 0};
  float maximum = log2_maximum, weight = 1;
  if (sink) {  // it may lie far above every score
    maximum = fmaxf(log2_maximum, *sink * kLog2e);
    weight = exp2_approx(log2_maximum - maximum);
    sum = sum * weight + exp2_approx(*sink * kLog2e - maximum);
  }
  const float lse = wants_lse ? maximum * kLn2 + logf(sum) : 0.f;
  return {weight / sum, lse, maximum, sum};
}

}  // namespace blasst::cuda
