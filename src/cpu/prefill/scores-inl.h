// The scores of a query tile and a key tile in prefill, [key][row].
#if defined(BLASST_CPU_PREFILL_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_PREFILL_SCORES_INL_H_
#undef BLASST_CPU_PREFILL_SCORES_INL_H_
#else
#define BLASST_CPU_PREFILL_SCORES_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/arithmetic/int8-inl.h"
#include "cpu/plan.h"
#include "cpu/prefill/key_tile-inl.h"
#include "cpu/prefill/query_tile-inl.h"
#include "cpu/tile/product-inl.h"
#include "cpu/tile/score-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// What the products of a tile are, for kLanes rows from `row` on: scores already,
struct PlainScores {
  static HWY_INLINE auto OfRows(int64_t) {
    return [](V score) { return score; };
  }
};

// or sums of integers, which the units of their row and key tile make scores, and the row's product
// with the mean key. Rounded one after the other, so that every instruction set has the same.
template <typename S>
class Int8Scores {
 public:
  Int8Scores(const PrefillTile& tile, float key_unit) : tile_(tile), key_unit_(key_unit) {}

  HWY_INLINE auto OfRows(int64_t row) const {
    const V unit = hn::Mul(hn::Load(f, tile_.unit + row), hn::Set(f, key_unit_));
    const V shift = hn::Load(f, tile_.shift + row);
    return [unit, shift](V sum) { return hn::Add(hn::Mul(S::AsFloat(sum), unit), shift); };
  }

 private:
  const PrefillTile& tile_;
  float key_unit_;
};

// All products, and the largest of each row, as they come: neither capped nor masked. `between` is
// called between blocks of them.
template <typename S, typename A, typename Between>
HWY_NOINLINE void Products(const PrefillTile& tile, const KeyTile<S, A>& keys, int64_t depth,
                           const Between& between, float* scores) {
  for (int panel = 0; panel < tile.panels; ++panel) {
    V most[kPanelVectors];
    for (V& x : most) x = hn::Set(f, -kInf);
    for (int64_t key = 0; key < keys.padded(); key += kBroadcasts) {
      between();
      Accumulators sums;
      Clear(sums);
      Multiply<S>(keys.k() + key * depth, depth, 1, tile.q + panel * kPanel * depth, kPanel, depth,
                  sums);
      for (int b = 0; b < kBroadcasts; ++b) {
        for (int v = 0; v < kPanelVectors; ++v) {
          hn::Store(sums[b][v], f, scores + (key + b) * kQueryRows + panel * kPanel + v * kLanes);
          most[v] = hn::Max(most[v], sums[b][v]);
        }
      }
    }
    for (int v = 0; v < kPanelVectors; ++v)
      hn::Store(most[v], f, tile.rows.t + panel * kPanel + v * kLanes);
  }
}

// The same with queries and keys in int8: sums of integers are left as they are, only the rows'
// maxima become scores.
template <typename S, typename A, typename Between>
HWY_NOINLINE void Int8Products(const PrefillTile& tile, const KeyTile<S, A>& keys, int64_t depth,
                               const Between& between, float* sums) {
  const int32_t* key_sums = keys.int8().sums;
  for (int panel = 0; panel < tile.panels; ++panel) {
    V most[kPanelVectors];
    for (V& x : most) x = S::Least();
    for (int64_t key = 0; key < keys.padded(); key += kBroadcasts) {
      between();
      Accumulators block;
      for (int b = 0; b < kBroadcasts; ++b)
        for (V& x : block[b]) x = S::First(key_sums[key + b]);
      Multiply<S>(keys.k() + key * depth, depth, 1, tile.q + panel * kPanel * depth, kPanel, depth,
                  block);
      for (int b = 0; b < kBroadcasts; ++b) {
        for (int v = 0; v < kPanelVectors; ++v) {
          hn::Store(block[b][v], f, sums + (key + b) * kQueryRows + panel * kPanel + v * kLanes);
          most[v] = S::Max(most[v], block[b][v]);
        }
      }
    }
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t row = panel * kPanel + v * kLanes;
      const Int8Scores<S> scores(tile, *keys.int8().unit);
      hn::Store(scores.OfRows(row)(most[v]), f, tile.rows.t + row);
    }
  }
}

// Makes scores of all sums; those of broken keys are NaN.
template <typename S>
HWY_NOINLINE void FinishInt8(const PrefillTile& tile, const Int8Scores<S>& from, int64_t keys,
                             uint64_t broken, float* scores) {
  for (int64_t r = 0; r < tile.panels * kPanel; r += kLanes) {
    const auto score = from.OfRows(r);
    for (int64_t key = 0; key < keys; ++key) {
      float* at = scores + key * kQueryRows + r;
      hn::Store(score(hn::Load(f, at)), f, at);
    }
  }
  for (; broken; broken &= broken - 1) {
    float* of_key = scores + std::countr_zero(broken) * kQueryRows;
    std::fill(of_key, of_key + tile.panels * kPanel, std::numeric_limits<float>::quiet_NaN());
  }
}

inline HWY_NOINLINE void CapScores(const PrefillTile& tile, int64_t keys, float* scores) {
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t r = 0; r < tile.panels * kPanel; r += kLanes) {
      float* at = scores + key * kQueryRows + r;
      hn::Store(CapScore(tile.rows.unit, hn::Load(f, at)), f, at);
    }
  }
}

// The largest score of each row, where no score is masked or NaN.
inline void CapMaxima(const PrefillTile& tile) {
  for (int64_t r = 0; r < tile.rows.count; r += kLanes)
    hn::Store(CapScore(tile.rows.unit, hn::Load(f, tile.rows.t + r)), f, tile.rows.t + r);
}

// Sets what a row does not see to -inf and takes the row maxima anew, NaN left aside. Whether a row
// that counts has a NaN. NaN is made canonical, which Exp2 passes on.
inline HWY_NOINLINE bool MaskScores(const PrefillTile& tile, Range keys, int64_t padded,
                                    float* scores) {
  const SeenKeys keys_seen(tile, keys);
  bool nan = false;
  for (int v = 0; v < tile.panels * kPanelVectors; ++v) {
    V most = hn::Set(f, -kInf);
    for (int64_t key = 0; key < padded; ++key) {
      float* at = scores + key * kQueryRows + v * kLanes;
      const M seen = hn::RebindMask(f, keys_seen.Mask(key, v));
      V s = hn::IfThenElse(seen, hn::Load(f, at), hn::Set(f, -kInf));
      const M is_nan = hn::IsNaN(s);
      nan |= !hn::AllFalse(f, is_nan);
      s = hn::IfThenElse(is_nan, hn::Set(f, std::numeric_limits<float>::quiet_NaN()), s);
      most = hn::IfThenElse(hn::Gt(s, most), s, most);
      hn::Store(s, f, at);
    }
    hn::Store(most, f, tile.rows.t + v * kLanes);
  }
  return nan;
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
