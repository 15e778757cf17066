// In what softmax keeps scores.
#if defined(BLASST_CPU_TILE_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_TILE_SCORE_INL_H_
#undef BLASST_CPU_TILE_SCORE_INL_H_
#else
#define BLASST_CPU_TILE_SCORE_INL_H_
#endif

#include <limits>

#include "cpu/plan.h"
#include "cpu/tile/exp-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// Softmax state keeps scores in a unit of its own: raw dot products without soft cap, so that
// skipped tiles are never scaled.
struct ScoreUnit {
  ScoreUnit() = default;
  // `of_product`: what a raw product is multiplied by.
  ScoreUnit(float of_product, float cap)
      : product(of_product),
        softcap(cap),
        scale(cap > 0 ? 1.0f : of_product),
        log2(static_cast<float>(scale * kLog2e)) {}
  ScoreUnit(const Problem& p, const QueryTile& tile)
      : ScoreUnit(p.score_scale(tile.request, tile.head / p.group()), p.softcap) {}

  float product, softcap;
  float scale;  // of a score in this unit, to natural log
  float log2;   // to log2
};

// A raw product, scaled and soft-capped, in that unit.
HWY_INLINE V CapScore(const ScoreUnit& unit, V product) {
  if (unit.softcap == 0) return product;
  return SoftCap(hn::Mul(product, hn::Set(f, unit.product)), hn::Set(f, unit.softcap));
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
