// A query tile of prefill: its queries, lanes being rows, and which keys they see.
#if defined(BLASST_CPU_PREFILL_QUERY_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_PREFILL_QUERY_TILE_INL_H_
#undef BLASST_CPU_PREFILL_QUERY_TILE_INL_H_
#else
#define BLASST_CPU_PREFILL_QUERY_TILE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/arithmetic/int8-inl.h"
#include "cpu/int8/keys.h"
#include "cpu/int8/quantize-inl.h"
#include "cpu/plan.h"
#include "cpu/tile/product-inl.h"
#include "cpu/tile/rows-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

struct PrefillTile {
  const QueryTile* query;
  Range key_tiles;  // that it may visit
  Range inner;      // keys that every row sees
  std::array<Range, kQueryRows> keys;
  int panels;       // that hold rows
  float magnitude;  // of its queries
  float* q;         // [panels][head_dim / kPack][kPanel] words
  float* o;         // [value_dim][kQueryRows]
  TileRows rows;
  // Of scores in int8: a row's unit, and its product with the mean key.
  float *unit = nullptr, *shift = nullptr;

  // Takes prefill_tile_floats of the scratch.
  PrefillTile(const Problem& p, float*& scratch)
      : q(std::exchange(scratch, scratch + kQueryRows * p.head_dim)),
        o(std::exchange(scratch, scratch + kQueryRows * p.value_dim)),
        rows(p, kQueryRows, std::exchange(scratch, scratch + kQueryRows * kRowArrays)) {
    if (p.scores == BLASST_SCORES_EXACT) return;
    unit = std::exchange(scratch, scratch + kQueryRows);
    shift = std::exchange(scratch, scratch + kQueryRows);
  }

  bool Visits(const Problem& p, int64_t j) const {
    return j >= key_tiles.begin && j < key_tiles.end && p.block_visible(*query, j);
  }

  // Transposes the queries and resets the state. `row`: room for one.
  template <typename S>
  void Begin(const Problem& p, const Int8Keys* int8, const QueryTile& tile, float* row) {
    query = &tile;
    inner = {0, p.max_keys};
    for (int64_t r = 0; r < kQueryRows; ++r) {
      keys[r] = r < tile.rows() ? p.row_keys(tile, r) : Range{};
      if (r < tile.rows()) inner = intersect(inner, keys[r]);
    }
    key_tiles = problem::tile_range({keys.data(), static_cast<size_t>(tile.rows())}, kKeys);
    panels = static_cast<int>(problem::ceil_div(tile.rows(), kPanel));
    rows.Begin(p, tile, prefill_shape());
    const int64_t depth = p.head_dim / S::kPack;
    std::fill_n(q, kQueryRows * depth, 0.0f);
    std::fill_n(o, kQueryRows * p.value_dim, 0.0f);
    if (key_tiles.empty()) return;
    if constexpr (kIsInt8<S>) {
      std::fill_n(unit, kQueryRows, 0.0f);
      std::fill_n(shift, kQueryRows, 0.0f);
    }
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const std::byte* from = p.query(tile.request, tile.position_of(r), tile.head);
      if constexpr (kIsInt8<S>) {
        const float* mean = int8->mean(tile.request, tile.head / p.group());
        alignas(64) int8_t bytes[kMaxDim];
        const auto [row_unit, row_shift] = QuantizeQuery<S::kDType>(p, from, mean, row, bytes);
        unit[r] = row_unit, shift[r] = row_shift;
        S::StageQuery(bytes, p.head_dim, row);
      } else {
        S::Stage(from, p.head_dim, row);
      }
      float* to = q + r / kPanel * kPanel * depth + r % kPanel;
      for (int64_t d = 0; d < depth; ++d) to[d * kPanel] = row[d];
    }
    if constexpr (kIsInt8<S>) {
      magnitude = 127 * *std::max_element(unit, unit + kQueryRows);
      // What products are added to is far from the largest number, or somebody looks for NaN.
      for (int r = 0; r < kQueryRows; ++r)
        if (!(std::abs(shift[r]) < 1e37f)) magnitude = kInf;
    } else {
      magnitude = LargestMagnitude<S>(q, kQueryRows * depth);
    }
  }
};

// Which keys of one key tile the rows of a query tile see, a lane a row.
class SeenKeys {
 public:
  SeenKeys(const PrefillTile& tile, Range keys) {
    for (int r = 0; r < kQueryRows; ++r) {
      const Range seen = intersect(tile.keys[r], keys);
      begin_[r] = static_cast<int32_t>(seen.empty() ? 0 : seen.begin - keys.begin);
      end_[r] = static_cast<int32_t>(seen.empty() ? 0 : seen.end - keys.begin);
    }
  }

  // Of key `key` of the tile, for the rows of vector v.
  HWY_INLINE hn::Mask<I> Mask(int64_t key, int v) const {
    const auto index = hn::Set(i32, static_cast<int32_t>(key));
    return hn::AndNot(hn::Lt(index, hn::Load(i32, begin_ + v * kLanes)),
                      hn::Lt(index, hn::Load(i32, end_ + v * kLanes)));
  }

 private:
  alignas(64) int32_t begin_[kQueryRows], end_[kQueryRows];
};

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
