// The scores of a query tile and a key tile in decode, [row][key].
#if defined(BLASST_CPU_DECODE_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_DECODE_SCORES_INL_H_
#undef BLASST_CPU_DECODE_SCORES_INL_H_
#else
#define BLASST_CPU_DECODE_SCORES_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/decode/fetch-inl.h"
#include "cpu/decode/query_tile-inl.h"
#include "cpu/plan.h"
#include "cpu/tile/score-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// The lanes' sum.
template <typename D>
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> SumBlocks([[maybe_unused]] D d, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    return SumBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  } else {
    return v;
  }
}

// The sums of four vectors' lanes.
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> SumFour(const V* v) {
  const hn::Repartition<double, F> pairs;
  const V ab = hn::Add(hn::InterleaveLower(f, v[0], v[1]), hn::InterleaveUpper(f, v[0], v[1]));
  const V cd = hn::Add(hn::InterleaveLower(f, v[2], v[3]), hn::InterleaveUpper(f, v[2], v[3]));
  const auto p = hn::BitCast(pairs, ab), q = hn::BitCast(pairs, cd);
  return SumBlocks(f, hn::Add(hn::BitCast(f, hn::InterleaveLower(pairs, p, q)),
                              hn::BitCast(f, hn::InterleaveUpper(pairs, p, q))));
}

// The words of a key from `at` on; behind its last, zeros.
template <typename S>
HWY_INLINE V KeyWords(const std::byte* row, int64_t at, int64_t depth) {
  if (HWY_LIKELY(at + kLanes <= depth)) return S::LoadWords(row, at);
  alignas(64) float words[kLanes] = {};
  S::Stage(row + at * S::kPack * kElementBytes<S>, (depth - at) * S::kPack, words);
  return hn::Load(f, words);
}

template <typename S, int kRows, typename Between>
HWY_INLINE void RowProducts(const DecodeTile& tile, const Rows& keys, int64_t first,
                            const Between& between, float* scores) {
  const hn::FixedTag<float, 4> four;
  const float* q = tile.q + first * tile.stride;
  for (int64_t key = 0; key < kKeys; key += kKeyGroup) {
    between(first, key);
    V sums[kRows][kKeyGroup];
    for (auto& row : sums)
      for (V& x : row) x = hn::Zero(f);
    for (int64_t d = 0; d < tile.depth; d += kLanes) {
      V k[kKeyGroup];
      for (int i = 0; i < kKeyGroup; ++i) k[i] = KeyWords<S>(keys[key + i], d, tile.depth);
      for (int r = 0; r < kRows; ++r) {
        const V row = hn::LoadU(f, q + r * tile.stride + d);
        for (int i = 0; i < kKeyGroup; ++i) sums[r][i] = S::MulAdd(row, k[i], sums[r][i]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      hn::StoreU(SumFour(sums[r]), four, scores + (first + r) * kKeys + key);
  }
}

// All products, as they come: neither capped nor masked. `between` is called with the first row and
// key of each block of them.
template <typename S, typename Between>
HWY_NOINLINE void Products(const DecodeTile& tile, const Rows& keys, const Between& between,
                           float* scores) {
  ForRowGroups(tile.rows.count, [&](auto size, int64_t first) {
    RowProducts<S, size()>(tile, keys, first, between, scores);
  });
}

// Soft cap, mask, then each row's maximum, NaN left aside. Whether a row that counts has a NaN.
inline HWY_NOINLINE bool Maxima(const DecodeTile& tile, Range keys, float* all_scores) {
  const ScoreUnit& unit = tile.rows.unit;
  const bool boundary = tile.Boundary(keys);
  bool nan = false;
  for (int64_t r = 0; r < tile.rows.count; ++r) {
    float* scores = all_scores + r * kKeys;
    const Range seen = intersect(tile.ranges[r], keys);
    V most = hn::Set(f, -kInf);
    for (int64_t key = 0; key < kKeys; key += kLanes) {
      V s = CapScore(unit, hn::LoadU(f, scores + key));
      if (boundary) {
        const auto index = hn::Iota(i32, static_cast<int32_t>(keys.begin + key));
        const auto inside =
            hn::AndNot(hn::Lt(index, hn::Set(i32, static_cast<int32_t>(seen.begin))),
                       hn::Lt(index, hn::Set(i32, static_cast<int32_t>(seen.end))));
        s = hn::IfThenElse(hn::RebindMask(f, inside), s, hn::Set(f, -kInf));
      }
      const M is_nan = hn::IsNaN(s);
      if (HWY_UNLIKELY(!hn::AllFalse(f, is_nan))) {
        nan = true;
        s = hn::IfThenElse(is_nan, hn::Set(f, std::numeric_limits<float>::quiet_NaN()), s);
      }
      if (boundary || unit.softcap > 0 || nan) hn::StoreU(s, f, scores + key);
      most = hn::IfThenElse(hn::Gt(s, most), s, most);
    }
    tile.rows.t[r] = hn::GetLane(hn::MaxOfLanes(f, most));
    tile.rows.seen[r] = static_cast<float>(seen.size());
  }
  return nan;
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
