// The outputs of a query tile in prefill, [value_dim][row], and a kept key tile's part in them.
#if defined(BLASST_CPU_PREFILL_VALUES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_PREFILL_VALUES_INL_H_
#undef BLASST_CPU_PREFILL_VALUES_INL_H_
#else
#define BLASST_CPU_PREFILL_VALUES_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/plan.h"
#include "cpu/prefill/key_tile-inl.h"
#include "cpu/prefill/query_tile-inl.h"
#include "cpu/tile/product-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// o[d][row] = rescale[row] * o[d][row] + sum over keys of v[key][d] * p[key][row].
template <typename S, typename A>
HWY_NOINLINE void AddValues(const PrefillTile& tile, const KeyTile<S, A>& keys, int64_t dim,
                            const float* probabilities) {
  const int64_t steps = keys.steps();
  const float* rescale = tile.rows.rescale;
  for (int64_t d = 0; d < dim; d += kBroadcasts) {
    for (int panel = 0; panel < tile.panels; ++panel) {
      float* o = tile.o + d * kQueryRows + panel * kPanel;
      Accumulators sums;
      for (int b = 0; b < kBroadcasts; ++b) {
        for (int v = 0; v < kPanelVectors; ++v)
          sums[b][v] = hn::Mul(hn::Load(f, o + b * kQueryRows + v * kLanes),
                               hn::Load(f, rescale + panel * kPanel + v * kLanes));
      }
      Multiply<A>(keys.v() + d * steps, 1, kBroadcasts, probabilities + panel * kPanel, kQueryRows,
                  steps, sums);
      for (int b = 0; b < kBroadcasts; ++b) {
        for (int v = 0; v < kPanelVectors; ++v)
          hn::Store(sums[b][v], f, o + b * kQueryRows + v * kLanes);
      }
    }
  }
}

// All ones in the elements of a word whose keys the rows of vector v see.
template <typename A>
HWY_INLINE V SeenWord(const SeenKeys& seen, int64_t step, int v) {
  const auto element = [&](int64_t key) { return hn::VecFromMask(i32, seen.Mask(key, v)); };
  if constexpr (A::kPack == 1) {
    return hn::BitCast(f, element(step));
  } else {
    return hn::BitCast(f, hn::Or(hn::And(element(2 * step), hn::Set(i32, 0xffff)),
                                 hn::AndNot(hn::Set(i32, 0xffff), element(2 * step + 1))));
  }
}

// The same where a masked key has a NaN or infinite value: 0 * inf must not reach rows that
// cannot see it, so they multiply a zero instead.
template <typename S, typename A>
void AddValuesWhereVisible(const PrefillTile& tile, const KeyTile<S, A>& keys, int64_t dim,
                           const float* probabilities) {
  const int64_t steps = keys.steps();
  const SeenKeys seen(tile, keys.keys());
  for (int64_t d = 0; d < dim; ++d) {
    const float* words = keys.v() + d / kBroadcasts * kBroadcasts * steps + d % kBroadcasts;
    for (int v = 0; v < tile.panels * kPanelVectors; ++v) {
      float* o = tile.o + d * kQueryRows + v * kLanes;
      V sum = hn::Mul(hn::Load(f, o), hn::Load(f, tile.rows.rescale + v * kLanes));
      for (int64_t step = 0; step < steps; ++step) {
        const V word = hn::And(hn::Set(f, words[step * kBroadcasts]), SeenWord<A>(seen, step, v));
        sum = A::MulAdd(word, hn::Load(f, probabilities + step * kQueryRows + v * kLanes), sum);
      }
      hn::Store(sum, f, o);
    }
  }
}

// out[row][d] = o[d][row].
inline HWY_NOINLINE void Transpose(const float* o, int64_t dim, float* out) {
  const hn::Repartition<double, F> pairs;
  alignas(64) float rows[4][kLanes];  // row 4 * block + i of four d in block `block` of rows[i]
  for (int64_t d = 0; d < dim; d += 4) {
    for (int64_t first = 0; first < kQueryRows; first += kLanes) {
      const float* from = o + d * kQueryRows + first;
      const V a = hn::Load(f, from), b = hn::Load(f, from + kQueryRows);
      const V c = hn::Load(f, from + 2 * kQueryRows), e = hn::Load(f, from + 3 * kQueryRows);
      const auto ab_low = hn::BitCast(pairs, hn::InterleaveLower(f, a, b));
      const auto ab_high = hn::BitCast(pairs, hn::InterleaveUpper(f, a, b));
      const auto ce_low = hn::BitCast(pairs, hn::InterleaveLower(f, c, e));
      const auto ce_high = hn::BitCast(pairs, hn::InterleaveUpper(f, c, e));
      hn::Store(hn::BitCast(f, hn::InterleaveLower(pairs, ab_low, ce_low)), f, rows[0]);
      hn::Store(hn::BitCast(f, hn::InterleaveUpper(pairs, ab_low, ce_low)), f, rows[1]);
      hn::Store(hn::BitCast(f, hn::InterleaveLower(pairs, ab_high, ce_high)), f, rows[2]);
      hn::Store(hn::BitCast(f, hn::InterleaveUpper(pairs, ab_high, ce_high)), f, rows[3]);
      for (int r = 0; r < kLanes; ++r)
        std::memcpy(out + (first + r) * dim + d, rows[r % 4] + r / 4 * 4, 16);
    }
  }
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
