// Tiles in shared memory, as the copy engine writes them and wgmma reads them.
#pragma once

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

}  // namespace blasst::cuda
