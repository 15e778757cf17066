// Where a thread's elements of S^T [keys, query rows] and O^T [value elements, query rows] are
// (wgmma.cuh), and which keys a row sees.
#pragma once

#include "cuda/core/decode/params.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ptx.cuh"
#include "cuda/sm90/decode/layout.cuh"

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

// The keys that a row of the item sees; group: query heads of a KV head.
__device__ __forceinline__ Range range_of(const Params& p, const Item& item, int group, int row) {
  const int position = item.keys - p.query_length + row / group;
  return keys_seen(position, position, p.distances, item.keys);
}

}  // namespace blasst::cuda::decode
