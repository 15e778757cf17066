// The end of an output row, the same for prefill and decode.
#if defined(BLASST_CPU_SIMD_FINISH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_SIMD_FINISH_INL_H_
#undef BLASST_CPU_SIMD_FINISH_INL_H_
#else
#define BLASST_CPU_SIMD_FINISH_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/problem.h"
#include "cpu/plan.h"
#include "cpu/simd/arithmetic-inl.h"
#include "cpu/simd/exp-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// Softmax state keeps scores in a unit of its own: raw dot products without soft cap, so that
// skipped tiles are never scaled.
struct ScoreUnit {
  explicit ScoreUnit(const Problem& p)
      : scale(p.softcap > 0 ? 1.0f : p.scale), log2(static_cast<float>(scale * kLog2e)) {}

  float scale;  // of a score in this unit, to natural log
  float log2;   // to log2
};

// What softmax sums up of a row. Sums are relative to a maximum in the score's unit, never to a
// rounded multiple of it: of scores beyond 2^20 that leaves no digits.
struct RowSum {
  float m = -kInf;  // running maximum
  float l = 0;      // sum of the kept exp(score - m)
  // The same of the bound on skipped keys, which may lie far above m under the absolute test.
  float skipped_m = -kInf;
  float skipped = 0;
};

// Adds a skipped tile to the bound of kLanes rows: each row's maximum in it, as often as the row
// has keys there.
HWY_INLINE void AddSkipped(ScoreUnit unit, V t, V keys, float* skipped_m, float* skipped) {
  const V scale = hn::Set(f, unit.log2);
  const V old_m = hn::LoadU(f, skipped_m), m = hn::Max(old_m, t);
  const V base = hn::IfThenZeroElse(hn::Eq(m, hn::Set(f, -kInf)), m);  // no valid key yet
  const V before = hn::Mul(hn::LoadU(f, skipped), Exp2(hn::Mul(hn::Sub(old_m, base), scale)));
  hn::StoreU(m, f, skipped_m);
  hn::StoreU(hn::MulAdd(keys, Exp2(hn::Mul(hn::Sub(t, base), scale)), before), f, skipped);
}

struct RowTotal {
  float inverse;  // of the denominator, relative to the running maximum; 0: no valid key
  double lse;
  float bound;  // fraction of the probability that skipped keys may hold
};

// The head's sink joins the denominator.
inline RowTotal FinishRow(const Problem& p, int64_t head, ScoreUnit unit, const RowSum& row) {
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

// Stores an output row and what the report asks of it.
inline void WriteRow(const Problem& p, const QueryTile& tile, int64_t row, const float* out,
                     const RowTotal& total) {
  const int64_t head = tile.head_of(row), position = tile.position_of(row);
  StoreFloats(p.dtype, out, p.value_dim, p.output(tile.request, position, head));
  const int64_t at = head * p.rows + p.requests[tile.request].first_row + position;
  if (p.report.lse) p.report.lse[at] = static_cast<float>(total.lse);
  if (p.report.dropped_mass_bound) p.report.dropped_mass_bound[at] = total.bound;
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
