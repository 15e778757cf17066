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

// s = Q K^T: of each strip. query: of the warp's first row.
template <typename C>
__device__ __forceinline__ void multiply_scores(float (&s)[C::kStrips][C::kKeys / 2],
                                                uint32_t query, uint32_t key) {
  using T = typename C::Element;
  const uint32_t a_lane = offset_by_blocks<typename C::Queries>();
  const uint32_t b_lane = offset_by_rows<typename C::Keys>();
#pragma unroll
  for (int step = 0; step < C::kQkDim / 16; ++step) {
    uint32_t a[C::kStrips][4];
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
      ptx::load_matrices(
          a[i], query + i * 16 * C::Queries::kRowBytes + C::Queries::advance(a_lane, step));
    }
#pragma unroll
    for (int j = 0; j < C::kKeys / 16; ++j) {
      uint32_t b[4];
      ptx::load_matrices(b, key + j * 16 * C::Keys::kRowBytes + C::Keys::advance(b_lane, step));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < C::kStrips; ++i) {
          float* d = &s[i][8 * j + 4 * half];
          step == 0 ? ptx::multiply_first<T>(d, a[i], b[2 * half], b[2 * half + 1])
                    : ptx::multiply_add<T>(d, a[i], b[2 * half], b[2 * half + 1]);
        }
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
  const uint32_t b_lane = offset_by_blocks<typename C::Values>();
#pragma unroll
  for (int step = 0; step < C::kKeys / 16; ++step) {
    uint32_t a[C::kStrips][4];
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[i][e] = p[i][4 * step + e];
    }
#pragma unroll
    for (int j = 0; j < C::kValueDim / 16; ++j) {
      uint32_t b[4];
      ptx::load_matrices_transposed(
          b, value + step * 16 * C::Values::kRowBytes + C::Values::advance(b_lane, j));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < C::kStrips; ++i)
          ptx::multiply_add<T>(&o[i][8 * j + 4 * half], a[i], b[2 * half], b[2 * half + 1]);
      }
    }
  }
}

}  // namespace blasst::cuda::prefill::sm80
