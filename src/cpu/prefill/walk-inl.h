// Prefill of one unit: a few neighbouring query tiles of one head walk the key tiles together.
//
// Everything is kept transposed: lanes are query rows. So K and V are read as they are stored, one
// broadcast word at a time; row maxima, the tile test and the softmax sums are plain vector
// operations without a single horizontal step; only Q is transposed on the way in and the output on
// the way out.
#if defined(BLASST_CPU_PREFILL_WALK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_PREFILL_WALK_INL_H_
#undef BLASST_CPU_PREFILL_WALK_INL_H_
#else
#define BLASST_CPU_PREFILL_WALK_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/plan.h"
#include "cpu/prefill/key_tile-inl.h"
#include "cpu/prefill/query_tile-inl.h"
#include "cpu/prefill/scores-inl.h"
#include "cpu/prefill/values-inl.h"
#include "cpu/tile/product-inl.h"
#include "cpu/tile/rows-inl.h"
#include "cpu/tile/score-inl.h"
#include "cpu/tile/softmax-inl.h"
#include "cpu/tile/test-inl.h"
#include "cpu/totals.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Turns scores into probabilities relative to the new running maximum, in words of A, and updates m
// and l. May work in place. `kind`: what the products are.
template <typename A, typename Kind>
HWY_NOINLINE void Softmax(const PrefillTile& tile, const Kind& kind, const float* products,
                          int64_t keys, float* probabilities) {
  const TileRows& rows = tile.rows;
  for (int64_t at = 0; at < tile.panels * kPanel; at += kLanes) {
    const V base = Rebase(rows, at);
    const auto score = kind.OfRows(at);
    V sum[2] = {hn::Zero(f), hn::Zero(f)};
    for (int64_t key = 0; key < keys; key += 2 * A::kPack) {
      for (int half = 0; half < 2; ++half) {
        V p[A::kPack];
        for (int i = 0; i < A::kPack; ++i) {
          const float* from = products + (key + half * A::kPack + i) * kQueryRows + at;
          p[i] = Probability(rows.unit, score(hn::Load(f, from)), base);
          sum[half] = hn::Add(sum[half], p[i]);
        }
        hn::Store(A::Pack(p), f, probabilities + (key / A::kPack + half) * kQueryRows + at);
      }
    }
    hn::Store(hn::MulAdd(hn::Load(f, rows.l + at), hn::Load(f, rows.rescale + at),
                         hn::Add(sum[0], sum[1])),
              f, rows.l + at);
  }
}

// Scores are products of S, sums of values those of A.
template <typename S, typename A>
class PrefillWalk {
 public:
  // `int8`: the keys, if S is int8.
  PrefillWalk(const Problem& p, const Int8Keys* int8, const PrefillUnit& unit, Totals& totals,
              float* scratch)
      : key_tiles_{{p, int8, scratch}, {p, int8, scratch}},
        p_(p),
        unit_(unit),
        totals_(totals),
        depth_(p.head_dim / S::kPack),
        kv_head_(unit.tiles.front().head / p.group()) {
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    scores_ = take(kKeys * kQueryRows);
    probabilities_ = A::kPack == 1 ? scores_ : take(kKeys / A::kPack * kQueryRows);
    row_words_ = take(kMaxDim);
    out_ = take(kQueryRows * p.value_dim);
    tiles_.reserve(unit.tiles.size());
    for (const QueryTile& tile : unit.tiles)
      tiles_.emplace_back(p, scratch).template Begin<S>(p, int8, tile, row_words_);
    int64_t blocks = 0;
    for (const PrefillTile& tile : tiles_) blocks += tile.panels * (kKeys / kBroadcasts);
    rows_a_block_ = problem::ceil_div(2 * kKeys, blocks);
  }

  void Run() {
    int64_t at = NextVisited(0);
    if (at < unit_.key_tiles.size()) Stage(at, *now_);
    while (at < unit_.key_tiles.size()) {
      const int64_t next = NextVisited(at + 1);
      has_next_ = next < unit_.key_tiles.size();
      if (has_next_) Stage(next, *next_);
      // A tile whose values nobody needs is most likely followed by another one.
      values_ahead_ = std::exchange(values_used_, false);
      const int64_t j = problem::nth_tile(p_.order, unit_.key_tiles, at);
      for (PrefillTile& tile : tiles_)
        if (tile.Visits(p_, j)) Visit(tile, j);
      std::swap(now_, next_);
      at = next;
    }
    for (const PrefillTile& tile : tiles_) Finish(tile);
  }

 private:
  // The first position of the visit from `at` on whose key tile a query tile visits; the end if
  // there is none.
  int64_t NextVisited(int64_t at) const {
    const auto visited = [&](int64_t j) {
      return std::ranges::any_of(tiles_,
                                 [&](const PrefillTile& tile) { return tile.Visits(p_, j); });
    };
    while (at < unit_.key_tiles.size() &&
           !visited(problem::nth_tile(p_.order, unit_.key_tiles, at)))
      ++at;
    return at;
  }

  void Stage(int64_t at, KeyTile<S, A>& keys) {
    keys.Begin(unit_.tiles.front().request, kv_head_,
               problem::nth_tile(p_.order, unit_.key_tiles, at));
  }

  void Visit(PrefillTile& tile, int64_t j) {
    const Range keys = now_->keys();
    // 1. Scores and row maxima; the next key tile is copied between blocks of products.
    now_->FinishKeys();
    const auto copy_ahead = [&] {
      if (has_next_) next_->Copy(rows_a_block_, values_ahead_ || values_used_);
    };
    if constexpr (kIsInt8<S>) {
      Int8Products<S, A>(tile, *now_, depth_, copy_ahead, scores_);
    } else {
      Products<S, A>(tile, *now_, depth_, copy_ahead, scores_);
    }
    // Finite queries and keys whose products cannot overflow give no NaN, so nothing looks for one.
    const bool may_be_nan =
        !(tile.magnitude * now_->k_magnitude() * static_cast<float>(p_.head_dim) < 1e37f);
    const bool boundary =
        keys.begin < tile.inner.begin || keys.end > tile.inner.end || now_->padded() > keys.size();
    bool mask = boundary || may_be_nan;
    if constexpr (kIsInt8<S>) mask |= *now_->int8().broken != 0;
    const bool capped = p_.softcap > 0;
    if constexpr (kIsInt8<S>) {
      const Int8Tile& int8 = now_->int8();
      if (mask) FinishInt8<S>(tile, {tile, *int8.unit}, now_->padded(), *int8.broken, scores_);
    }
    if (capped && !mask) CapMaxima(tile);
    if (capped && mask) CapScores(tile, now_->padded(), scores_);
    const bool nan = mask && MaskScores(tile, keys, now_->padded(), scores_);

    // 2. The test.
    if (!Decide(tile.rows, *tile.query, j, nan, totals_)) {
      if (p_.report.dropped_mass_bound) {
        for (int64_t r = 0; r < tile.rows.count; ++r)
          tile.rows.seen[r] = static_cast<float>(intersect(tile.keys[r], keys).size());
        AddSkipped(tile.rows);
      }
      return;
    }

    // 3. Probabilities, and the values that they weigh.
    now_->FinishValues();
    values_used_ = true;
    Weigh(tile, mask, capped);
    if (now_->v_finite() || !boundary) {
      AddValues<S, A>(tile, *now_, p_.value_dim, probabilities_);
    } else {
      AddValuesWhereVisible<S, A>(tile, *now_, p_.value_dim, probabilities_);
    }
  }

  // Probabilities from the products, which are scores already if they were masked, and then capped,
  // too.
  void Weigh(const PrefillTile& tile, bool masked, bool capped) {
    if constexpr (kIsInt8<S>) {
      const Int8Scores<S> scores(tile, *now_->int8().unit);
      if (!masked && !capped)
        return Softmax<A>(tile, scores, scores_, now_->padded(), probabilities_);
      if (!masked) FinishInt8<S>(tile, scores, now_->padded(), 0, scores_);
    }
    if (capped && !masked) CapScores(tile, now_->padded(), scores_);
    Softmax<A>(tile, PlainScores(), scores_, now_->padded(), probabilities_);
  }

  // Divides by the denominator, writes output rows, LSE and bound.
  void Finish(const PrefillTile& tile) {
    Transpose(tile.o, p_.value_dim, out_);
    for (int64_t r = 0; r < tile.rows.count; ++r)
      FinishRow(p_, *tile.query, r, SumOf(tile.rows, r), out_ + r * p_.value_dim);
  }

  KeyTile<S, A> key_tiles_[2];
  KeyTile<S, A>*now_ = &key_tiles_[0], *next_ = &key_tiles_[1];
  std::vector<PrefillTile> tiles_;
  const Problem& p_;
  const PrefillUnit& unit_;
  Totals& totals_;
  int64_t depth_;  // words a query or key
  int64_t kv_head_;
  float *scores_, *probabilities_, *row_words_;
  float* out_;            // [kQueryRows][value_dim]
  int64_t rows_a_block_;  // of the next key tile, copied at every block of products
  bool has_next_ = false;
  bool values_used_ = true, values_ahead_ = true;  // by this key tile, by the one before
};

template <typename S, typename A>
void Prefill(const Problem& p, const PrefillUnit& unit, Totals& totals, float* scratch) {
  PrefillWalk<S, A>(p, nullptr, unit, totals, scratch).Run();
}

template <typename S, typename A>
void PrefillInt8(const Problem& p, const Int8Keys& keys, const PrefillUnit& unit, Totals& totals,
                 float* scratch) {
  PrefillWalk<S, A>(p, &keys, unit, totals, scratch).Run();
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
