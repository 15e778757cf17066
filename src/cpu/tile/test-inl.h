// The tile test, and what is reported of a tested tile.
#if defined(BLASST_CPU_TILE_TEST_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_TILE_TEST_INL_H_
#undef BLASST_CPU_TILE_TEST_INL_H_
#else
#define BLASST_CPU_TILE_TEST_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/tile/rows-inl.h"
#include "cpu/totals.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Kept unless every row with a valid score lies below. Outputs are summed relative to m alone, so
// that their bits do not depend on whether there is a test.
HWY_INLINE bool Keep(const TileRows& rows) {
  const V none = hn::Set(f, -kInf);
  bool keep = false;
  for (int64_t r = 0; r < rows.count; r += kLanes) {
    const V t = hn::Load(f, rows.t + r);
    const V m = hn::Max(hn::Load(f, rows.m + r), hn::Load(f, rows.seed + r));
    const V tested = rows.absolute ? t : hn::Sub(t, m);
    // A row's first keys are never skipped: with m = -inf the relative test is false by itself.
    const M low = hn::And(hn::Lt(tested, hn::Load(f, rows.skip_below + r)), hn::Gt(m, none));
    const M veto = hn::AndNot(hn::Or(low, hn::Eq(t, none)), hn::FirstN(f, rows.count - r));
    keep |= !hn::AllFalse(f, veto);
  }
  return keep;
}

// The largest row maximum - running maximum, in natural log. `nan`: a score is NaN.
inline double Gap(const TileRows& rows, bool nan) {
  if (nan) return std::numeric_limits<double>::quiet_NaN();
  double gap = -kInf;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (rows.t[r] > -kInf)
      gap = std::max(gap, double{rows.t[r]} - std::max(rows.m[r], rows.seed[r]));
  }
  return gap * rows.unit.scale;
}

// The largest valid score.
inline float Maximum(const TileRows& rows, bool nan) {
  if (nan) return std::numeric_limits<float>::quiet_NaN();
  return *std::max_element(rows.t, rows.t + rows.count) * rows.unit.scale;
}

// Decides on a key tile whose row maxima are there, and counts it.
inline bool Decide(const TileRows& rows, const QueryTile& tile, int64_t key_tile, bool nan,
                   Totals& totals) {
  const bool kept = Keep(rows) || nan;
  totals.count(tile, key_tile, kept, totals.wants_gaps() ? Gap(rows, nan) : 0);
  if (totals.wants_maxima()) totals.record(tile, key_tile, Maximum(rows, nan));
  return kept;
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
