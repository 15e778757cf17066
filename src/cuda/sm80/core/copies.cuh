// Copies from global memory into panels.
#pragma once

#include <cstdint>

#include "cuda/sm80/core/panels.cuh"
#include "cuda/sm80/core/ptx.cuh"

namespace blasst::cuda {

// How kThreads threads, a warp or more, copy a tile of `Tile`'s panels. Four neighbours copy a
// row's 64 bytes of a panel, eight those of two rows: that writes every bank once. The next eight
// copy the next panel of these rows, so that memory is read in whole lines of 128 bytes.
template <typename Tile, int kThreads>
struct ThreadCopies {
  static constexpr int kAcross = Tile::kCount % 2 == 0 ? 2 : 1;  // panels at once
  static constexpr int kPassRows = kThreads / 8 / kAcross * 2;   // rows at once
  static_assert(Tile::kRows % kPassRows == 0);

  static __device__ __forceinline__ int rank() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ int row() { return rank() / 8 / kAcross * 2 + rank() / 4 % 2; }
  static __device__ __forceinline__ int panel() { return rank() / 8 % kAcross; }
  static __device__ __forceinline__ int piece() { return rank() % 4; }
  static __device__ __forceinline__ int element() { return panel() * 32 + piece() * 8; }

  // Of the pass that copies rows row() + pass * kPassRows.
  static __device__ __forceinline__ uint32_t offset(int pass) {
    const uint32_t first = Tile::panel(panel());
    if constexpr (kPassRows % 8 == 0)  // the permutation is that of the first pass
      return first + Tile::offset(row(), piece()) + pass * kPassRows * Tile::kRowBytes;
    else
      return first + Tile::offset(row() + pass * kPassRows, piece());
  }

  // source(pass): the first of this thread's elements in the pass, null: zeros.
  template <typename Source>
  static __device__ __forceinline__ void start(uint32_t destination, const Source& source) {
#pragma unroll
    for (int pass = 0; pass < Tile::kRows / kPassRows; ++pass) {
      const uint16_t* from = source(pass);
#pragma unroll
      for (int first = 0; first < Tile::kCount; first += kAcross)
        ptx::copy_16(destination + offset(pass) + Tile::panel(first), from + first * 32,
                     from != nullptr);
    }
  }

  // The same of rows that all exist, `stride` elements apart. source: of row 0.
  static __device__ __forceinline__ void start_whole(uint32_t destination, const uint16_t* source,
                                                     int64_t stride) {
    // Two, since a copy reads its address late.
    const uint16_t* from[2];
    from[0] = source + row() * stride + element();
    from[1] = from[0] + kPassRows * stride;
#pragma unroll
    for (int pass = 0; pass < Tile::kRows / kPassRows; ++pass) {
#pragma unroll
      for (int first = 0; first < Tile::kCount; first += kAcross)
        ptx::copy_16(destination + offset(pass) + Tile::panel(first), from[pass % 2] + first * 32,
                     true);
      from[pass % 2] += 2 * kPassRows * stride;
    }
  }
};

}  // namespace blasst::cuda
