// The two matrix products of a warp's rows.
#pragma once

#include <cstdint>

#include "cuda/sm80/core/ptx.cuh"
#include "cuda/sm80/prefill/config.cuh"

namespace blasst::cuda::prefill::sm80 {

// Offsets of the rows that a lane gives to ldmatrix: of 16 rows of two 8-column blocks, block by
// block (rows of the first operand; transposed, the second of P V) or rows by rows (the second of
// Q K^T).
template <typename Tile>
__device__ __forceinline__ uint32_t offset_by_blocks() {
  return Tile::offset(threadIdx.x % 16, threadIdx.x / 16 % 2);
}
template <typename Tile>
__device__ __forceinline__ uint32_t offset_by_rows() {
  return Tile::offset(threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8, threadIdx.x / 8 % 2);
}

// Of 16 elements of a warp's queries, strip by strip.
template <typename C>
using QueryFragments = uint32_t[C::kStrips][4];

// Those of elements 16 * step on. query: of the warp's first row.
template <typename C>
__device__ __forceinline__ void load_queries(QueryFragments<C>& a, uint32_t query, int step) {
  const uint32_t lane = offset_by_blocks<typename C::Queries>();
#pragma unroll
  for (int i = 0; i < C::kStrips; ++i)
    ptx::load_matrices(a[i],
                       query + i * 16 * C::Queries::kRowBytes + C::Queries::advance(lane, step));
}

// s = Q K^T: of each strip. first: fragments of step 0. query: of the warp's first row. Fragments
// are loaded two products ahead: two warps a scheduler do not hide the way from shared memory.
template <typename C>
__device__ __forceinline__ void multiply_scores(float (&s)[C::kStrips][C::kKeys / 2],
                                                const QueryFragments<C>& first, uint32_t query,
                                                uint32_t key) {
  using T = typename C::Element;
  constexpr int kSteps = C::kQkDim / 16, kBlocks = C::kKeys / 16, kAhead = 2;
  static_assert(kBlocks >= kAhead);  // no queries are overwritten in use
  const uint32_t b_lane = offset_by_rows<typename C::Keys>();
  QueryFragments<C> a[2];
  uint32_t b[kAhead + 1][4];
  const auto load = [&](int x) {
    if (x >= kSteps * kBlocks) return;
    const int step = x / kBlocks, j = x % kBlocks;
    if (j == 0 && step > 0) load_queries<C>(a[step % 2], query, step);
    ptx::load_matrices(b[x % (kAhead + 1)],
                       key + j * 16 * C::Keys::kRowBytes + C::Keys::advance(b_lane, step));
  };
#pragma unroll
  for (int x = 0; x < kAhead; ++x) load(x);
#pragma unroll
  for (int x = 0; x < kSteps * kBlocks; ++x) {
    load(x + kAhead);
    const int step = x / kBlocks, j = x % kBlocks;
    const uint32_t(&keys)[4] = b[x % (kAhead + 1)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < C::kStrips; ++i) {
        float* d = &s[i][8 * j + 4 * half];
        const uint32_t b0 = keys[2 * half], b1 = keys[2 * half + 1];
        step == 0 ? ptx::multiply_first<T>(d, first[i], b0, b1)
                  : ptx::multiply_add<T>(d, a[step % 2][i], b0, b1);
      }
    }
  }
}

// o += P V.
template <typename C>
__device__ __forceinline__ void multiply_values(float (&o)[C::kStrips][C::kValueDim / 2],
                                                const uint32_t (&p)[C::kStrips][C::kKeys / 4],
                                                uint32_t value) {
  using T = typename C::Element;
  constexpr int kSteps = C::kKeys / 16, kBlocks = C::kValueDim / 16;
  const uint32_t b_lane = offset_by_blocks<typename C::Values>();
  uint32_t b[2][4];
  const auto load_values = [&](int x) {
    ptx::load_matrices_transposed(b[x % 2], value + x / kBlocks * 16 * C::Values::kRowBytes +
                                                C::Values::advance(b_lane, x % kBlocks));
  };
  load_values(0);
#pragma unroll
  for (int x = 0; x < kSteps * kBlocks; ++x) {
    const int step = x / kBlocks, j = x % kBlocks;
    if (x + 1 < kSteps * kBlocks) load_values(x + 1);
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
      const uint32_t a[4] = {p[i][4 * step], p[i][4 * step + 1], p[i][4 * step + 2],
                             p[i][4 * step + 3]};
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::multiply_add<T>(&o[i][8 * j + 4 * half], a, b[x % 2][2 * half],
                             b[x % 2][2 * half + 1]);
    }
  }
}

}  // namespace blasst::cuda::prefill::sm80
