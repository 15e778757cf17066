// Where a thread of a consumer warpgroup stands.
#pragma once

#include "cuda/sm90/core/ptx.cuh"

namespace blasst::cuda::prefill {

// Where a thread's scores are (core/fragment.cuh): rows of its warp's 16, columns of every 8.
struct ThreadPlace {
  const int warpgroup = ptx::warp_uniform(threadIdx.x / 128) - 1;
  __device__ __forceinline__ int tile() const { return warpgroup; }
  __device__ __forceinline__ int rank() const { return threadIdx.x % 128; }
  __device__ __forceinline__ int strip() const { return rank() / 32; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int row(int r) const { return strip() * 16 + lane() / 4 + 8 * r; }
  __device__ __forceinline__ int column() const { return 2 * (lane() % 4); }
};

}  // namespace blasst::cuda::prefill
