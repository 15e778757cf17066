// Which keys a row sees, which key tiles a query tile visits, and in which order. Plain integer
// functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "blasst/blasst.hpp"

namespace blasst::problem {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Half-open range of keys or of tiles.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
};

inline Range intersect(Range a, Range b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

// Distances position - key that a row may look across, both ends included.
struct Distances {
  int64_t least;
  int64_t most;
};

// Causal mask, window and, when it is not null, a head's band, as one range of distances.
inline Distances allowed_distances(const Mask& mask, const int64_t* band) {
  constexpr int64_t unlimited = int64_t{1} << 40;  // beyond every length, far from overflow
  Distances d{-unlimited, unlimited};
  if (mask.causal) d.least = 0;
  if (mask.window_right >= 0) d.least = std::max(d.least, -std::min(mask.window_right, unlimited));
  if (mask.window_left >= 0) d.most = std::min(d.most, mask.window_left);
  if (band) d = {std::max(d.least, band[0]), std::min(d.most, band[1])};
  return d;
}

// The keys that a query at `position` (bottom-right aligned) sees among `keys`.
inline Range visible_keys(Distances distances, int64_t position, int64_t keys) {
  const Range range{std::max<int64_t>(0, position - distances.most),
                    std::min(keys, position - distances.least + 1)};
  return range.empty() ? Range{} : range;
}

// The tiles between the first and the last key that any of the rows sees.
inline Range tile_range(std::span<const Range> rows, int64_t tile_keys) {
  Range keys{std::numeric_limits<int64_t>::max(), 0};
  for (const Range& row : rows) {
    if (row.empty()) continue;
    keys = {std::min(keys.begin, row.begin), std::max(keys.end, row.end)};
  }
  return keys.empty() ? Range{} : Range{keys.begin / tile_keys, ceil_div(keys.end, tile_keys)};
}

// Whether any row sees a key of the tile: bands can leave gaps inside tile_range.
inline bool any_visible(std::span<const Range> rows, Range tile_keys) {
  return std::ranges::any_of(rows, [&](Range row) { return !intersect(row, tile_keys).empty(); });
}

// The i-th tile of a visit of `tiles`.
inline int64_t nth_tile(Order order, Range tiles, int64_t i) {
  if (order == BLASST_FORWARD) return tiles.begin + i;
  if (order == BLASST_SINK_FIRST && tiles.begin == 0) return i == 0 ? 0 : tiles.end - i;
  return tiles.end - 1 - i;
}

// The gap histogram's bin of a gap (natural log).
inline int gap_bin(double gap) {
  constexpr int inner = BLASST_GAP_BINS - 2;
  if (!(gap < 0)) return BLASST_GAP_BINS - 1;  // NaN too
  if (gap < -BLASST_GAP_RANGE) return 0;
  return std::min(inner,
                  1 + static_cast<int>((gap + BLASST_GAP_RANGE) * (inner / BLASST_GAP_RANGE)));
}

}  // namespace blasst::problem
