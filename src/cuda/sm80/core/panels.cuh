// Tiles in shared memory: rows of 64 bytes, whose 16-byte pieces are permuted so that the eight
// rows that ldmatrix reads at once, or that copies write, lie in different banks.
#pragma once

#include <cstdint>

namespace blasst::cuda {

// A tile [kRows_, kDim] of 2-byte elements, in panels of [kRows_, 32]. The odd ones come last and
// are half a row of banks off: then both halves of 128 bytes of a row are copied at once.
template <int kRows_, int kDim>
struct Panels32 {
  static constexpr int kRows = kRows_;
  static constexpr int kRowBytes = 64;
  static constexpr int kCount = kDim / 32;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kCount * kPanelBytes + kRowBytes;

  // Where a panel begins.
  static constexpr __device__ __forceinline__ uint32_t panel(int index) {
    return (index / 2 + index % 2 * ((kCount + 1) / 2)) * kPanelBytes + index % 2 * kRowBytes;
  }

  // Of a piece, 0 to 3, of a row of the first panel.
  static __device__ __forceinline__ uint32_t offset(int row, int piece) {
    return row * kRowBytes + (piece ^ (row >> 1 & 3)) * 16;
  }

  // What is 16 * `step` elements further on in a row: `lane` is an offset in the first panel, of
  // piece 0 or 1.
  static __device__ __forceinline__ uint32_t advance(uint32_t lane, int step) {
    return (step % 2 ? lane ^ 32 : lane) + panel(step / 2);
  }
};

}  // namespace blasst::cuda
