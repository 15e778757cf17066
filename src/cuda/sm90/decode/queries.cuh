// Queries in shared memory, of a request that has fewer positions than another may have.
#pragma once

#include <cstddef>

#include "cuda/core/ptx.cuh"
#include "cuda/sm90/core/panels.cuh"
#include "cuda/sm90/core/ptx.cuh"

namespace blasst::cuda::decode {

// A copy brings as many rows as any request may have. Zeros in place of those from `rows` to
// `copied`, which are another request's; the panels are Tile's. All `kThreads` threads, which meet
// at the named barrier.
template <typename Tile, int kThreads>
__device__ __forceinline__ void clear_other_queries(std::byte* queries, int rows, int copied,
                                                    int barrier) {
  if (rows == copied) return;
  constexpr int kVectors = kPanelRowBytes / 16;  // of a swizzled row, within which it stays
  const int each = (copied - rows) * kVectors;
  for (int i = threadIdx.x % kThreads; i < each * Tile::kCount; i += kThreads)
    *reinterpret_cast<int4*>(queries + i / each * Tile::kPanelBytes + rows * kPanelRowBytes +
                             i % each * 16) = make_int4(0, 0, 0, 0);
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(barrier, kThreads);
}

}  // namespace blasst::cuda::decode
