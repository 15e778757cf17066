#include "cpu/plan.h"

#include <algorithm>
#include <utility>

#include "problem/element.h"

namespace blasst::cpu {

using problem::ceil_div;

TileShape prefill_shape() { return {.query_rows = kQueryRows, .keys = kKeys}; }

TileShape decode_shape(const Problem& p) {
  return {.query_rows = p.group() * p.max_rows, .keys = kKeys, .split_tiles = kSplitTiles};
}

namespace {

Range visit_range(const Problem& p, const QueryTile& tile) {
  std::vector<Range> rows;
  for (int64_t r = 0; r < tile.rows(); ++r) rows.push_back(p.row_keys(tile, r));
  return problem::tile_range(rows, kKeys);
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

int64_t decode_unit_heads(int64_t kv_heads, int64_t splits, int threads) {
  int64_t heads = std::min<int64_t>(kv_heads, kUnitHeads);
  while (heads > 1 && splits * ceil_div(kv_heads, heads) < 4 * threads) heads = ceil_div(heads, 2);
  return heads;
}

int64_t count_splits(int64_t tiles) {
  return tiles <= kSplitTiles ? tiles > 0 : ceil_div(tiles - BLASST_SEED_TILES, kSplitTiles);
}

Range split_positions(int64_t tiles, int64_t split) {
  const int64_t begin = split * kSplitTiles;
  return {begin, split + 1 < count_splits(tiles) ? begin + kSplitTiles : tiles};
}

std::vector<DecodeUnit> decode_units(const Problem& p, std::span<const QueryTile> tiles,
                                     int threads) {
  // A tile without keys has one empty split, which writes its zeros.
  const auto splits_of = [](Range key_tiles) {
    return std::max<int64_t>(1, count_splits(key_tiles.size()));
  };
  std::vector<Range> ranges;
  int64_t all_splits = 0;
  for (const QueryTile& tile : tiles) {
    ranges.push_back(visit_range(p, tile));
    all_splits += splits_of(ranges.back());
  }
  const int64_t most = decode_unit_heads(p.kv_heads, all_splits / p.kv_heads, threads);
  std::vector<DecodeUnit> units;
  int64_t partial = 0;
  for (size_t first = 0, count = 0; first < tiles.size(); first += count) {
    const Range range = ranges[first];
    for (count = 1; first + count < tiles.size() && std::cmp_less(count, most); ++count) {
      const Range other = ranges[first + count];
      if (tiles[first + count].request != tiles[first].request || other.begin != range.begin ||
          other.end != range.end)
        break;
    }
    const int64_t splits = splits_of(range);
    for (int64_t i = 0; i < splits; ++i)
      units.push_back({tiles.subspan(first, count), range, split_positions(range.size(), i), i,
                       splits, partial});
    partial += static_cast<int64_t>(count) * splits;
  }
  return units;
}

int64_t decode_partials(std::span<const DecodeUnit> units) {
  if (units.empty()) return 0;
  const DecodeUnit& last = units.back();
  return last.first_partial(last.tiles.size());
}

int64_t most_decode_partials(const Problem& p) {
  const int64_t splits = count_splits(p.geometry(decode_shape(p)).key_tiles);
  return p.batch * p.kv_heads * std::max<int64_t>(1, splits);
}

bool takes_seeds(const Problem& p) {
  return p.test.kind != BLASST_TEST_NONE || p.report.gap_histogram;
}

size_t prefill_scratch_floats(const Problem& p) {
  const int64_t int8_arrays = p.scores == BLASST_SCORES_INT8 ? 2 : 0;
  const int64_t query_tile = kQueryRows * (p.head_dim + p.value_dim + kRowArrays + int8_arrays);
  return 2 * kKeys * kQueryRows + kMaxDim + kQueryRows * p.value_dim +
         2 * kKeys * (p.head_dim + p.value_dim) + kUnitTiles * query_tile;
}

size_t decode_scratch_floats(const Problem& p) {
  const int64_t rows = decode_shape(p).query_rows;
  const int64_t wide = (problem::is_8_bits(p.kv.k.dtype) ? padded(p.head_dim) : 0) +
                       (problem::is_8_bits(p.kv.v.dtype) ? padded(p.value_dim) : 0);
  return rows * (2 * kKeys + padded(p.head_dim) + padded(p.value_dim)) + kRowArrays * padded(rows) +
         kKeys * wide;
}

size_t decode_partial_floats(const Problem& p) {
  return padded(decode_shape(p).query_rows * (5 + p.value_dim));
}

Partial decode_partial(const Problem& p, float* storage) {
  const int64_t rows = decode_shape(p).query_rows;
  return {storage,
          storage + rows,
          storage + 2 * rows,
          storage + 3 * rows,
          storage + 4 * rows,
          storage + 5 * rows,
          p.value_dim};
}

}  // namespace blasst::cpu
