// Which keys rows see, and in which order tiles are visited. The same on the host and in kernels.
#pragma once

#include "blasst/blasst.h"
#include "cuda/core/host_device.h"
#include "cuda/core/params.h"

namespace blasst::cuda {

BLASST_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Half-open range of keys or tiles; empty if begin >= end.
struct Range {
  int begin, end;
};

// Keys that some row at positions [first, last] sees.
BLASST_HOST_DEVICE Range keys_seen(int first, int last, Distances distances, int keys) {
  const int begin = first - distances.most > 0 ? first - distances.most : 0;
  const int end = last - distances.least + 1 < keys ? last - distances.least + 1 : keys;
  return {begin, end};
}

// The i-th tile of a visit. order: blasst_order.
BLASST_HOST_DEVICE int tile_at(int order, Range tiles, int i) {
  if (order == BLASST_FORWARD) return tiles.begin + i;
  if (order == BLASST_SINK_FIRST && tiles.begin == 0) return i == 0 ? 0 : tiles.end - i;
  return tiles.end - 1 - i;  // reverse
}

// The gap histogram's bin of a gap, in natural logarithms.
BLASST_HOST_DEVICE int gap_bin(float gap) {
  constexpr int kInner = BLASST_GAP_BINS - 2;
  constexpr float kRange = BLASST_GAP_RANGE;
  if (!(gap < 0)) return BLASST_GAP_BINS - 1;  // NaN too
  if (gap < -kRange) return 0;
  const int bin = 1 + static_cast<int>((gap + kRange) * (kInner / kRange));
  return bin < kInner ? bin : kInner;
}

}  // namespace blasst::cuda
