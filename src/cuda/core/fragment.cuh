// Matrix products leave a warp's 16 rows x 8 columns so: a thread has rows lane / 4 and that + 8,
// and two columns from 2 * (lane % 4) in every 8. x[4 * j + 2 * r + e] is row r, column 8 * j + e.
#pragma once

#include "cuda/core/math.cuh"
#include "cuda/core/tiles.h"

namespace blasst::cuda {

// The largest of a thread's scores in each of its two rows, NaN if there is one.
template <int kCount>
__device__ __forceinline__ void row_maxima(const float (&s)[kCount], float (&maximum)[2]) {
  // Eight chains side by side: one after the other they would wait for their own results.
  float part[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) part[e] = s[e];
#pragma unroll
  for (int j = 8; j < kCount; j += 8) {
#pragma unroll
    for (int e = 0; e < 8; ++e) part[e] = max_nan(part[e], s[j + e]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    maximum[r] =
        max_nan(max_nan(part[2 * r], part[2 * r + 1]), max_nan(part[2 * r + 4], part[2 * r + 5]));
  }
}

// The same of integers.
template <int kCount>
__device__ __forceinline__ void row_maxima(const int (&s)[kCount], int (&maximum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int part[2];  // of every second eight columns: the instruction takes two more at once
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      part[h] = max(s[4 * h + 2 * r], s[4 * h + 2 * r + 1]);
#pragma unroll
      for (int j = 8 + 4 * h; j < kCount; j += 8)
        part[h] = __vimax3_s32(part[h], s[j + 2 * r], s[j + 2 * r + 1]);
    }
    maximum[r] = max(part[0], part[1]);
  }
}

// Of the four threads that share a row, NaN left aside.
__device__ __forceinline__ void quad_maxima(float (&x)[2]) {
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
    float other[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) other[r] = __shfl_xor_sync(kAllLanes, x[r], lanes);
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = fmaxf(x[r], other[r]);
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&x)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j)
      x[4 * j + 2 * r] *= factor[r], x[4 * j + 2 * r + 1] *= factor[r];
  }
}

// x[e] of lane l goes to x[l] of lane e, among four lanes.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? x[e] : x[e + 1], 1);
    (odd ? x[e] : x[e + 1]) = got;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, high ? x[e] : x[e + 2], 2);
    (high ? x[e] : x[e + 2]) = got;
  }
}

// x = f(x, i, first) for each element first + i, i < kAtOnce, by one piece of code for so many:
// what seldom runs should not push the loop around it out of the instruction cache. Registers have
// no index at run time, so they are pushed along.
template <int kAtOnce, typename T, int kCount, typename F>
__device__ __forceinline__ void for_each_rolled(T (&x)[kCount], const F& f) {
  static_assert(kCount % kAtOnce == 0);
#pragma unroll 1
  for (int first = 0; first < kCount; first += kAtOnce) {
    T y[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) y[i] = f(x[i], i, first);
#pragma unroll
    for (int i = kAtOnce; i < kCount; ++i) x[i - kAtOnce] = x[i];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[kCount - kAtOnce + i] = y[i];
  }
}

// The scores of a row's keys outside [seen.begin, seen.end) become `masked`. first_key: of the
// thread's first column; r: 0 or 1.
template <typename Score, int kCount>
__device__ __forceinline__ void mask_row(Score (&s)[kCount], int r, Range seen, int first_key,
                                         Score masked) {
  const int begin = seen.begin - first_key, end = seen.end - first_key;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Score& x = s[4 * j + 2 * r + e];
      x = 8 * j + e >= begin && 8 * j + e < end ? x : masked;
    }
  }
}

}  // namespace blasst::cuda
