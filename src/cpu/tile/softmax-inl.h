// Online softmax of a query tile's rows, and the end of an output row.
#if defined(BLASST_CPU_TILE_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_TILE_SOFTMAX_INL_H_
#undef BLASST_CPU_TILE_SOFTMAX_INL_H_
#else
#define BLASST_CPU_TILE_SOFTMAX_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "cpu/arithmetic/convert-inl.h"
#include "cpu/plan.h"
#include "cpu/tile/rows-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Takes a kept tile's maxima of kLanes rows from `at` on into account. What their scores are
// relative to from now on: m, or 0 in a row without any key yet, where 2^(-inf - 0) = 0 while
// 2^(-inf - -inf) would be NaN.
HWY_INLINE V Rebase(const TileRows& rows, int64_t at) {
  const V old_m = hn::Load(f, rows.m + at), m = hn::Max(old_m, hn::Load(f, rows.t + at));
  const V base = hn::IfThenZeroElse(hn::Eq(m, hn::Set(f, -kInf)), m);
  hn::Store(m, f, rows.m + at);
  hn::Store(Exp2(hn::Mul(hn::Sub(old_m, base), hn::Set(f, rows.unit.log2))), f, rows.rescale + at);
  return base;
}

// exp(score - base).
HWY_INLINE V Probability(ScoreUnit unit, V score, V base) {
  return Exp2(hn::Mul(hn::Sub(score, base), hn::Set(f, unit.log2)));
}

// Adds a skipped tile to the rows' bounds: each row's maximum in it, as often as the row has keys
// there.
inline void AddSkipped(const TileRows& rows) {
  for (int64_t r = 0; r < rows.count; r += kLanes) {
    const V t = hn::Load(f, rows.t + r), old_m = hn::Load(f, rows.skipped_m + r);
    const V m = hn::Max(old_m, t);
    const V base = hn::IfThenZeroElse(hn::Eq(m, hn::Set(f, -kInf)), m);  // no valid key yet
    const V before = hn::Mul(hn::Load(f, rows.skipped + r), Probability(rows.unit, old_m, base));
    hn::Store(m, f, rows.skipped_m + r);
    hn::Store(hn::MulAdd(hn::Load(f, rows.seen + r), Probability(rows.unit, t, base), before), f,
              rows.skipped + r);
  }
}

// What softmax has summed up of a row (see TileRows).
struct RowSum {
  float m = -kInf, l = 0;
  float skipped_m = -kInf, skipped = 0;
};

inline RowSum SumOf(const TileRows& rows, int64_t r) {
  return {rows.m[r], rows.l[r], rows.skipped_m[r], rows.skipped[r]};
}

struct RowTotal {
  float inverse;  // of the denominator, relative to the running maximum; 0: no valid key
  double lse;
  float bound;  // fraction of the probability that skipped keys may hold
};

// The head's sink joins the denominator.
inline RowTotal TotalOf(const Problem& p, ScoreUnit unit, int64_t head, const RowSum& row) {
  const double sink = p.sinks ? p.sinks[head] : -kInf;
  if (row.l == 0) return {0, sink, 0};
  const double m = double{row.m} * unit.scale;
  const double top = std::max(m, sink);
  const double shrink = std::exp(m - top);
  const double total = row.l * shrink + std::exp(sink - top);
  const double lse = top + std::log(total);
  const double skipped = double{row.skipped_m} * unit.scale + std::log(row.skipped);
  return {static_cast<float>(shrink / total), lse,
          row.skipped == 0 ? 0 : static_cast<float>(1 / (1 + std::exp(lse - skipped)))};
}

// Divides a row's outputs by the denominator, in the values' scale, and stores them and what the
// report asks of the row.
inline void FinishRow(const Problem& p, const QueryTile& tile, int64_t row, const RowSum& sum,
                      float* out) {
  const int64_t head = tile.head_of(row), position = tile.position_of(row);
  const RowTotal total = TotalOf(p, ScoreUnit(p, tile), head, sum);
  const float value_scale = p.value_scale(tile.request, tile.head / p.group());
  for (int64_t d = 0; d < p.value_dim; ++d)
    out[d] = total.inverse == 0 ? 0 : out[d] * total.inverse * value_scale;
  StoreFloats(p.dtype, out, p.value_dim, p.output(tile.request, position, head));
  const int64_t at = head * p.rows + p.requests[tile.request].first_row + position;
  if (p.report.lse) p.report.lse[at] = static_cast<float>(total.lse);
  if (p.report.dropped_mass_bound) p.report.dropped_mass_bound[at] = total.bound;
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
