// Tiles in shared memory, as the copy engine writes them and wgmma reads them.
#pragma once

#include <cstdint>

namespace blasst::cuda {

inline constexpr int kPanel = 64;  // elements of a 128-byte row: the copy engine's swizzle
inline constexpr int kPanelRowBytes = 128;

// A tile [kRows, kDim] of 2-byte elements, in panels of [kRows, 64].
template <int kRows, int kDim>
struct Panels {
  static constexpr int kRowBytes = kPanelRowBytes;
  static constexpr int kCount = kDim / kPanel;
  static constexpr int kPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kBytes = kCount * kPanelBytes;
};

// The same of bytes, in panels of [kRows, 128], or one of [kRows, 64].
template <int kRows, int kDim>
struct BytePanels {
  static constexpr int kRowBytes = kDim < kPanelRowBytes ? kDim : kPanelRowBytes;
  static constexpr int kCount = kDim / kRowBytes;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kCount * kPanelBytes;
};

// Where 16 bytes of a tile's row lie, the `vector`-th of them: the copy engine's swizzle permutes
// those of 128 bytes by the row, of 64 by every second one.
template <typename Tile>
__device__ __forceinline__ uint32_t place_of_vector(int row, int vector) {
  constexpr int kVectors = Tile::kRowBytes / 16;
  static_assert(kVectors == 8 || kVectors == 4);
  const int swizzle = kVectors == 8 ? row % 8 : row / 2 % 4;
  return vector / kVectors * Tile::kPanelBytes + row * Tile::kRowBytes +
         16 * (vector % kVectors ^ swizzle);
}

}  // namespace blasst::cuda
