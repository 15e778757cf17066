// The end of an output row, the same for prefill and decode.
#if defined(BLASST_CPU_SIMD_FINISH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_SIMD_FINISH_INL_H_
#undef BLASST_CPU_SIMD_FINISH_INL_H_
#else
#define BLASST_CPU_SIMD_FINISH_INL_H_
#endif

#include <cmath>
#include <limits>

#include "attention/problem.h"
#include "cpu/plan.h"
#include "cpu/simd/arithmetic-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

struct RowTotal {
  float inverse;  // of the denominator, relative to the running maximum; 0: no valid key
  float lse;
  float bound;  // fraction of the probability that skipped keys may hold
};

// From a row's running maximum (log2), kept sum and bound; the head's sink joins the denominator.
inline RowTotal FinishRow(const Problem& p, int64_t head, float log2_max, float l, float bound) {
  if (l == 0) return {0, -kInf, 0};
  const double log2_sink =
      p.sinks ? p.sinks[head] * kLog2e : -std::numeric_limits<double>::infinity();
  const double top = std::max<double>(log2_max, log2_sink);
  const double shrink = std::exp2(log2_max - top);
  const double total = l * shrink + std::exp2(log2_sink - top);
  return {static_cast<float>(shrink / total), static_cast<float>((top + std::log2(total)) * kLn2),
          static_cast<float>(bound * shrink / (bound * shrink + total))};
}

// Stores an output row and what the report asks of it.
inline void WriteRow(const Problem& p, const QueryTile& tile, int64_t row, const float* out,
                     const RowTotal& total) {
  const int64_t head = tile.head_of(row), position = tile.position_of(row);
  StoreFloats(p.dtype, out, p.value_dim, p.output(tile.request, position, head));
  const int64_t at = head * p.rows + p.requests[tile.request].first_row + position;
  if (p.report.lse) p.report.lse[at] = total.lse;
  if (p.report.dropped_mass_bound) p.report.dropped_mass_bound[at] = total.bound;
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
