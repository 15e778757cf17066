// A query tile of decode: its queries, a row after the other, and which keys they see.
#if defined(BLASST_CPU_DECODE_QUERY_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_DECODE_QUERY_TILE_INL_H_
#undef BLASST_CPU_DECODE_QUERY_TILE_INL_H_
#else
#define BLASST_CPU_DECODE_QUERY_TILE_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/arithmetic/vector-inl.h"
#include "cpu/plan.h"
#include "cpu/tile/rows-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

inline constexpr int kRowGroup = 4;  // rows that share a pass over a tile's keys or values

// Calls `work` with the size of each group of rows, as a constant, and its first row.
template <typename Work>
HWY_INLINE void ForRowGroups(int64_t count, const Work& work) {
  for (int64_t r = 0; r < count; r += kRowGroup) {
    switch (std::min<int64_t>(kRowGroup, count - r)) {
      case 1:
        work(std::integral_constant<int, 1>(), r);
        break;
      case 2:
        work(std::integral_constant<int, 2>(), r);
        break;
      case 3:
        work(std::integral_constant<int, 3>(), r);
        break;
      default:
        work(std::integral_constant<int, 4>(), r);
    }
  }
}

struct DecodeTile {
  const Problem& p;
  const QueryTile& query;
  const int64_t keys;         // of the request
  const int64_t depth;        // words a query or key
  const int64_t stride;       // words from one query to the next, zeros up to there
  std::vector<Range> ranges;  // keys that a row sees
  bool rows_differ = false;
  float* q;
  TileRows rows;

  template <typename S>
  static DecodeTile Make(const Problem& p, const QueryTile& query, float*& scratch) {
    DecodeTile tile(p, query, p.head_dim / S::kPack, scratch);
    for (int64_t r = 0; r < query.rows(); ++r)
      S::Stage(p.query(query.request, query.position_of(r), query.head_of(r)), p.head_dim,
               tile.q + r * tile.stride);
    return tile;
  }

  Range KeysOf(int64_t j) const { return {j * kKeys, std::min<int64_t>(keys, (j + 1) * kKeys)}; }

  bool Visits(int64_t j) const {
    return p.block_visible(query, j) && (!p.mask.bands || problem::any_visible(ranges, KeysOf(j)));
  }

  // Whether some row does not see all of a whole tile.
  bool Boundary(Range tile_keys) const {
    return tile_keys.size() < kKeys || std::ranges::any_of(ranges, [&](Range row) {
             return row.begin > tile_keys.begin || row.end < tile_keys.end;
           });
  }

 private:
  DecodeTile(const Problem& p, const QueryTile& query, int64_t words, float*& scratch)
      : p(p),
        query(query),
        keys(p.requests[query.request].keys),
        depth(words),
        stride(hwy::RoundUpTo(words, 16)),
        q(std::exchange(scratch, scratch + query.rows() * stride)),
        rows(p, Room(query), std::exchange(scratch, scratch + kRowArrays * Room(query))) {
    std::fill_n(q, query.rows() * stride, 0.0f);
    rows.Begin(p, query, decode_shape(p));
    for (int64_t r = 0; r < query.rows(); ++r) {
      ranges.push_back(p.row_keys(query, r));
      rows_differ |= ranges[r].begin != ranges[0].begin || ranges[r].end != ranges[0].end;
    }
  }

  static int64_t Room(const QueryTile& query) { return hwy::RoundUpTo(query.rows(), 16); }
};

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
