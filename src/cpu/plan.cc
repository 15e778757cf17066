#include "cpu/plan.h"

#include <algorithm>

namespace blasst::cpu {

using attention::ceil_div;

TileShape prefill_shape() { return {kQueryRows, kKeys, 0}; }

TileShape decode_shape(const Problem& p) {
  return {p.group() * (p.requests.empty() ? 1 : p.requests.front().rows), kKeys, kSplitTiles};
}

namespace {

Range visit_range(const Problem& p, const QueryTile& tile) {
  std::vector<Range> rows;
  for (int64_t r = 0; r < tile.rows(); ++r) rows.push_back(p.row_keys(tile, r));
  return attention::tile_range(rows, kKeys);
}

}  // namespace

std::vector<PrefillUnit> prefill_units(const Problem& p, std::span<const QueryTile> tiles) {
  std::vector<PrefillUnit> units;
  for (size_t first = 0; first < tiles.size();) {
    size_t count = 1;
    while (count < kUnitTiles && first + count < tiles.size() &&
           tiles[first + count].request == tiles[first].request &&
           tiles[first + count].head == tiles[first].head)
      ++count;
    PrefillUnit unit{tiles.subspan(first, count), {}};
    for (const QueryTile& tile : unit.tiles) {
      const Range range = visit_range(p, tile);
      if (range.empty()) continue;
      unit.key_tiles = unit.key_tiles.empty() ? range
                                              : Range{std::min(unit.key_tiles.begin, range.begin),
                                                      std::max(unit.key_tiles.end, range.end)};
    }
    units.push_back(unit);
    first += count;
  }
  std::ranges::stable_sort(units, std::ranges::greater{}, [](const PrefillUnit& u) {
    return u.key_tiles.size() * std::ssize(u.tiles);
  });
  return units;
}

std::vector<DecodeUnit> decode_units(const Problem& p, std::span<const QueryTile> tiles) {
  std::vector<DecodeUnit> units;
  for (const QueryTile& tile : tiles) {
    const Range range = visit_range(p, tile);
    int64_t begin = 0;
    do {  // a tile without keys has one empty split, which writes its zeros
      const int64_t end = std::min(range.size(), begin + kSplitTiles);
      units.push_back({&tile, range, {begin, end}});
      begin = end;
    } while (begin < range.size());
  }
  return units;
}

size_t prefill_scratch_floats(const Problem& p) {
  return 2 * kKeys * kQueryRows + 2 * kKeys * kMaxDim + kMaxDim +
         kUnitTiles * kQueryRows * (p.head_dim + p.value_dim);
}

size_t decode_scratch_floats(const Problem& p) {
  const int64_t rows = decode_shape(p).query_rows;
  return rows * (2 * kKeys + padded(p.head_dim) + padded(p.value_dim)) + 7 * padded(rows) + 64;
}

size_t decode_partial_floats(const Problem& p) {
  return padded(decode_shape(p).query_rows * (3 + p.value_dim));
}

Partial decode_partial(const Problem& p, float* storage) {
  const int64_t rows = decode_shape(p).query_rows;
  return {storage, storage + rows, storage + 2 * rows, storage + 3 * rows, p.value_dim};
}

}  // namespace blasst::cpu
