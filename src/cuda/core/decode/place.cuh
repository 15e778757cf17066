// Where a thread's elements of S^T [keys, query rows] and O^T [value elements, query rows] are: a
// warp has 16 of every 64 rows of these, as products leave them (wgmma, mma.sync m16n8k16).
#pragma once

#include "cuda/core/ptx.cuh"

namespace blasst::cuda::decode {

struct ThreadPlace {
  int warp, lane;

  __device__ __forceinline__ ThreadPlace()
      : warp(ptx::warp_uniform(threadIdx.x / 32)), lane(threadIdx.x % 32) {}

  // The query row of a thread's column, 0 to kRows / 4 - 1.
  __device__ __forceinline__ int row(int column) const {
    return 8 * (column / 2) + 2 * (lane % 4) + column % 2;
  }
  // The key, or value element, of a thread's half, 0 or 1.
  __device__ __forceinline__ int key(int half) const { return 16 * warp + lane / 4 + 8 * half; }
  static __device__ __forceinline__ constexpr int element(int column, int half) {
    return 4 * (column / 2) + 2 * half + column % 2;
  }
};

}  // namespace blasst::cuda::decode
