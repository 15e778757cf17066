// Prefill of one unit: a few neighbouring query tiles of one head walk the key tiles together.
//
// Everything is kept transposed: lanes are query rows. So K and V are read as they are stored, one
// broadcast word at a time; row maxima, the tile test and the softmax sums are plain vector
// operations without a single horizontal step; only Q is transposed on the way in and the output on
// the way out.
#if defined(BLASST_CPU_SIMD_PREFILL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_SIMD_PREFILL_INL_H_
#undef BLASST_CPU_SIMD_PREFILL_INL_H_
#else
#define BLASST_CPU_SIMD_PREFILL_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "attention/problem.h"
#include "cpu/plan.h"
#include "cpu/simd/arithmetic-inl.h"
#include "cpu/simd/exp-inl.h"
#include "cpu/simd/finish-inl.h"
#include "cpu/simd/key_tile-inl.h"
#include "cpu/simd/product-inl.h"
#include "cpu/totals.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

inline constexpr int kRowVectors = kQueryRows / kLanes;

// Softmax state of one query tile, a lane a row (see RowSum).
struct RowState {
  alignas(64) float m[kQueryRows];
  alignas(64) float l[kQueryRows];
  alignas(64) float skipped_m[kQueryRows];
  alignas(64) float skipped[kQueryRows];
};

// What the walk needs to know of one query tile.
struct TileState {
  const QueryTile* tile;
  Range key_tiles;  // that it may visit
  Range inner;      // keys that every row sees
  std::array<Range, kQueryRows> keys;
  float skip_below;  // what the tile test compares with, in the scores' unit
  float magnitude;   // of its queries
  float* q;          // [panels][head_dim / kPack][kPanel] words
  float* o;          // [value_dim][kQueryRows]
  RowState rows;
};

// Which keys of one key tile the rows of a query tile see, a lane a row.
class SeenKeys {
 public:
  SeenKeys(const TileState& tile, Range keys) {
    for (int r = 0; r < kQueryRows; ++r) {
      const Range seen = intersect(tile.keys[r], keys);
      begin_[r] = static_cast<int32_t>(seen.empty() ? 0 : seen.begin - keys.begin);
      end_[r] = static_cast<int32_t>(seen.empty() ? 0 : seen.end - keys.begin);
    }
  }

  // Of key `key` of the tile, for the rows of vector v.
  HWY_INLINE hn::Mask<I> Mask(int64_t key, int v) const {
    const auto index = hn::Set(i32, static_cast<int32_t>(key));
    return hn::AndNot(hn::Lt(index, hn::Load(i32, begin_ + v * kLanes)),
                      hn::Lt(index, hn::Load(i32, end_ + v * kLanes)));
  }

 private:
  alignas(64) int32_t begin_[kQueryRows], end_[kQueryRows];
};

template <typename A>
class PrefillWalk {
 public:
  PrefillWalk(const Problem& p, const PrefillUnit& unit, Totals& totals, float* scratch)
      : key_tiles_{{p, scratch}, {p, scratch}},
        p_(p),
        unit_(unit),
        totals_(totals),
        depth_(p.head_dim / A::kPack),
        score_unit_(p) {
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    scores_ = take(kKeys * kQueryRows);
    probabilities_ = A::kPack == 1 ? scores_ : take(kKeys / A::kPack * kQueryRows);
    row_words_ = take(kMaxDim);
    out_ = take(kQueryRows * p.value_dim);
    for (size_t i = 0; i < unit.tiles.size(); ++i) {
      tiles_[i].q = take(kQueryRows * depth_);
      tiles_[i].o = take(kQueryRows * p.value_dim);
    }
    const QueryTile& first = unit.tiles.front();
    kv_head_ = first.head / p.group();
    const int64_t steps = (kQueryRows / kPanel) * (kKeys / kBroadcasts);
    rows_a_step_ = attention::ceil_div(2 * kKeys, steps * std::ssize(unit.tiles));
  }

  void Run() {
    for (size_t i = 0; i < unit_.tiles.size(); ++i) Begin(unit_.tiles[i], tiles_[i]);
    int64_t at = NextVisited(0);
    if (at < unit_.key_tiles.size()) Stage(at, *now_);
    while (at < unit_.key_tiles.size()) {
      const int64_t next = NextVisited(at + 1);
      has_next_ = next < unit_.key_tiles.size();
      if (has_next_) Stage(next, *next_);
      // A tile whose values nobody needs is most likely followed by another one.
      values_ahead_ = std::exchange(values_used_, false);
      const int64_t j = attention::nth_tile(p_.order, unit_.key_tiles, at);
      for (size_t t = 0; t < unit_.tiles.size(); ++t)
        if (Visits(tiles_[t], j)) Visit(tiles_[t], j);
      std::swap(now_, next_);
      at = next;
    }
    for (size_t i = 0; i < unit_.tiles.size(); ++i) Finish(tiles_[i]);
  }

 private:
  bool Visits(const TileState& tile, int64_t j) const {
    return j >= tile.key_tiles.begin && j < tile.key_tiles.end && p_.block_visible(*tile.tile, j);
  }

  // The first position of the visit from `at` on whose key tile a query tile visits; the end if
  // there is none.
  int64_t NextVisited(int64_t at) const {
    const auto visited = [&](int64_t j) {
      return std::any_of(tiles_, tiles_ + unit_.tiles.size(),
                         [&](const TileState& tile) { return Visits(tile, j); });
    };
    while (at < unit_.key_tiles.size() &&
           !visited(attention::nth_tile(p_.order, unit_.key_tiles, at)))
      ++at;
    return at;
  }

  void Stage(int64_t at, KeyTile<A>& keys) {
    keys.Begin(unit_.tiles.front().request, kv_head_,
               attention::nth_tile(p_.order, unit_.key_tiles, at));
  }

  // Transposes the queries and resets the state.
  void Begin(const QueryTile& tile, TileState& state) {
    state.tile = &tile;
    state.skip_below =
        static_cast<float>(p_.skip_below(tile, tile.head, prefill_shape()) / score_unit_.scale);
    state.inner = {0, p_.max_keys};
    for (int64_t r = 0; r < kQueryRows; ++r) {
      state.keys[r] = r < tile.rows() ? p_.row_keys(tile, r) : Range{};
      if (r < tile.rows()) state.inner = intersect(state.inner, state.keys[r]);
      state.rows.m[r] = state.rows.skipped_m[r] = -kInf;
      state.rows.l[r] = state.rows.skipped[r] = 0;
    }
    state.key_tiles =
        attention::tile_range({state.keys.data(), static_cast<size_t>(tile.rows())}, kKeys);
    std::fill_n(state.q, kQueryRows * depth_, 0.0f);
    std::fill_n(state.o, kQueryRows * p_.value_dim, 0.0f);
    if (state.key_tiles.empty()) return;
    for (int64_t r = 0; r < tile.rows(); ++r) {
      A::Stage(p_.query(tile.request, tile.position_of(r), tile.head), p_.head_dim, row_words_);
      float* to = state.q + r / kPanel * kPanel * depth_ + r % kPanel;
      for (int64_t d = 0; d < depth_; ++d) to[d * kPanel] = row_words_[d];
    }
    state.magnitude = LargestMagnitude<A>(state.q, kQueryRows * depth_);
  }

  void Visit(TileState& tile, int64_t j) {
    now_->FinishKeys();
    V t[kRowVectors];  // row maxima
    Scores(tile, t);
    const Range keys = now_->keys();
    const bool boundary =
        keys.begin < tile.inner.begin || keys.end > tile.inner.end || now_->padded() > keys.size();
    // Finite queries and keys whose products cannot overflow give no NaN, so nothing looks for one.
    const bool may_be_nan =
        !(tile.magnitude * now_->k_magnitude() * static_cast<float>(p_.head_dim) < 1e37f);
    bool nan = false;
    bool capped = p_.softcap == 0;
    if (boundary || may_be_nan) {
      if (!capped) CapScores();
      capped = true;
      nan = MaskScores(tile, keys, t);
    } else if (!capped) {
      for (V& x : t) x = SoftCap(hn::Mul(x, hn::Set(f, p_.scale)), hn::Set(f, p_.softcap));
    }
    const bool kept = Keep(tile, t) || nan;
    totals_.count(*tile.tile, j, kept, totals_.wants_gaps() ? Gap(tile, t, nan) : 0);
    if (totals_.wants_maxima()) totals_.record(*tile.tile, j, Maximum(tile, t, nan));
    if (!kept) {
      if (p_.report.dropped_mass_bound) AddBound(tile, t, keys);
      return;
    }
    if (!capped) CapScores();
    now_->FinishValues();
    values_used_ = true;
    alignas(64) float rescale[kQueryRows];
    Softmax(tile.rows, t, rescale);
    if (now_->v_finite() || !boundary)
      AddValues(tile, rescale);
    else
      AddValuesWhereVisible(tile, rescale, keys);
  }

  // scores[key][row] = k . q, and the largest of each row.
  HWY_NOINLINE void Scores(const TileState& tile, V* t) {
    for (int panel = 0; panel < kQueryRows / kPanel; ++panel) {
      V most[kPanelVectors];
      for (V& x : most) x = hn::Set(f, -kInf);
      for (int64_t key = 0; key < now_->padded(); key += kBroadcasts) {
        if (has_next_) next_->Copy(rows_a_step_, values_ahead_ || values_used_);
        Accumulators sums;
        for (auto& row : sums)
          for (V& x : row) x = hn::Zero(f);
        Multiply<A>(now_->k() + key * depth_, depth_, 1, tile.q + panel * kPanel * depth_, kPanel,
                    depth_, sums);
        for (int b = 0; b < kBroadcasts; ++b) {
          for (int v = 0; v < kPanelVectors; ++v) {
            hn::Store(sums[b][v], f,
                      scores_ + (key + b) * kQueryRows + panel * kPanel + v * kLanes);
            most[v] = hn::Max(most[v], sums[b][v]);
          }
        }
      }
      for (int v = 0; v < kPanelVectors; ++v) t[panel * kPanelVectors + v] = most[v];
    }
  }

  HWY_NOINLINE void CapScores() {
    for (int64_t i = 0; i < now_->padded() * kQueryRows; i += kLanes) {
      const V scaled = hn::Mul(hn::Load(f, scores_ + i), hn::Set(f, p_.scale));
      hn::Store(SoftCap(scaled, hn::Set(f, p_.softcap)), f, scores_ + i);
    }
  }

  // Sets what a row does not see to -inf and takes the row maxima anew, NaN left aside. Whether a
  // row that counts has a NaN. NaN is made canonical, which Exp2 passes on.
  HWY_NOINLINE bool MaskScores(const TileState& tile, Range keys, V* t) {
    const SeenKeys keys_seen(tile, keys);
    bool nan = false;
    for (int v = 0; v < kRowVectors; ++v) {
      V most = hn::Set(f, -kInf);
      for (int64_t key = 0; key < now_->padded(); ++key) {
        float* at = scores_ + key * kQueryRows + v * kLanes;
        const M seen = hn::RebindMask(f, keys_seen.Mask(key, v));
        V s = hn::IfThenElse(seen, hn::Load(f, at), hn::Set(f, -kInf));
        const M is_nan = hn::IsNaN(s);
        nan |= !hn::AllFalse(f, is_nan);
        s = hn::IfThenElse(is_nan, hn::Set(f, std::numeric_limits<float>::quiet_NaN()), s);
        most = hn::IfThenElse(hn::Gt(s, most), s, most);
        hn::Store(s, f, at);
      }
      t[v] = most;
    }
    return nan;
  }

  // The tile test: kept unless every row with a valid score lies below.
  bool Keep(const TileState& tile, const V* t) const {
    const V below = hn::Set(f, tile.skip_below), none = hn::Set(f, -kInf);
    const int64_t count = tile.tile->rows();
    bool keep = false;
    for (int v = 0; v * kLanes < count; ++v) {
      const V m = hn::Load(f, tile.rows.m + v * kLanes);
      const V tested = p_.test.kind == BLASST_TEST_ABSOLUTE ? t[v] : hn::Sub(t[v], m);
      // A row's first keys are never skipped: with m = -inf the relative test is false by itself.
      const M low = hn::And(hn::Lt(tested, below), hn::Gt(m, none));
      const M veto = hn::AndNot(hn::Or(low, hn::Eq(t[v], none)),
                                hn::FirstN(f, std::max<int64_t>(0, count - v * kLanes)));
      keep |= !hn::AllFalse(f, veto);
    }
    return keep;
  }

  double Gap(const TileState& tile, const V* t, bool nan) const {
    if (nan) return std::numeric_limits<double>::quiet_NaN();
    alignas(64) float most[kQueryRows];
    for (int v = 0; v < kRowVectors; ++v) hn::Store(t[v], f, most + v * kLanes);
    double gap = -kInf;
    for (int64_t r = 0; r < tile.tile->rows(); ++r) {
      if (most[r] > -kInf) gap = std::max(gap, double{most[r]} - tile.rows.m[r]);
    }
    return gap * score_unit_.scale;
  }

  // The tile's largest valid score.
  float Maximum(const TileState& tile, const V* t, bool nan) const {
    if (nan) return std::numeric_limits<float>::quiet_NaN();
    alignas(64) float most[kQueryRows];
    for (int v = 0; v < kRowVectors; ++v) hn::Store(t[v], f, most + v * kLanes);
    return *std::max_element(most, most + tile.tile->rows()) * score_unit_.scale;
  }

  void AddBound(TileState& tile, const V* t, Range keys) const {
    alignas(64) float count[kQueryRows];
    for (int r = 0; r < kQueryRows; ++r)
      count[r] = static_cast<float>(intersect(tile.keys[r], keys).size());
    for (int v = 0; v < kRowVectors; ++v) {
      const int64_t at = v * kLanes;
      AddSkipped(score_unit_, t[v], hn::Load(f, count + at), tile.rows.skipped_m + at,
                 tile.rows.skipped + at);
    }
  }

  // Turns scores into probabilities relative to the new running maximum; updates m and l, and gives
  // the factor that the output so far shrinks by.
  HWY_NOINLINE void Softmax(RowState& rows, const V* t, float* rescale) {
    const V scale = hn::Set(f, score_unit_.log2), none = hn::Set(f, -kInf);
    for (int v = 0; v < kRowVectors; ++v) {
      const int64_t at = v * kLanes;
      const V old_m = hn::Load(f, rows.m + at);
      const V m = hn::Max(old_m, t[v]);
      // A row without any key yet: 2^(-inf - 0) = 0 where 2^(-inf - -inf) would be NaN.
      const V base = hn::IfThenZeroElse(hn::Eq(m, none), m);
      const V factor = Exp2(hn::Mul(hn::Sub(old_m, base), scale));
      V sum[2] = {hn::Zero(f), hn::Zero(f)};
      for (int64_t key = 0; key < now_->padded(); key += 2 * A::kPack) {
        for (int half = 0; half < 2; ++half) {
          V p[A::kPack];
          for (int i = 0; i < A::kPack; ++i) {
            const V s = hn::Load(f, scores_ + (key + half * A::kPack + i) * kQueryRows + at);
            p[i] = Exp2(hn::Mul(hn::Sub(s, base), scale));
            sum[half] = hn::Add(sum[half], p[i]);
          }
          hn::Store(A::Pack(p), f, probabilities_ + (key / A::kPack + half) * kQueryRows + at);
        }
      }
      hn::Store(m, f, rows.m + at);
      hn::Store(hn::MulAdd(hn::Load(f, rows.l + at), factor, hn::Add(sum[0], sum[1])), f,
                rows.l + at);
      hn::Store(factor, f, rescale + at);
    }
  }

  // o[d][row] = rescale[row] * o[d][row] + sum over keys of v[key][d] * p[key][row].
  HWY_NOINLINE void AddValues(TileState& tile, const float* rescale) {
    const int64_t steps = now_->steps();
    for (int64_t d = 0; d < p_.value_dim; d += kBroadcasts) {
      for (int panel = 0; panel < kQueryRows / kPanel; ++panel) {
        float* o = tile.o + d * kQueryRows + panel * kPanel;
        Accumulators sums;
        for (int b = 0; b < kBroadcasts; ++b) {
          for (int v = 0; v < kPanelVectors; ++v)
            sums[b][v] = hn::Mul(hn::Load(f, o + b * kQueryRows + v * kLanes),
                                 hn::Load(f, rescale + panel * kPanel + v * kLanes));
        }
        Multiply<A>(now_->v() + d * steps, 1, kBroadcasts, probabilities_ + panel * kPanel,
                    kQueryRows, steps, sums);
        for (int b = 0; b < kBroadcasts; ++b) {
          for (int v = 0; v < kPanelVectors; ++v)
            hn::Store(sums[b][v], f, o + b * kQueryRows + v * kLanes);
        }
      }
    }
  }

  // The same where a masked key has a NaN or infinite value: 0 * inf must not reach rows that
  // cannot see it, so they multiply a zero instead.
  void AddValuesWhereVisible(TileState& tile, const float* rescale, Range keys) {
    const int64_t steps = now_->steps();
    const SeenKeys seen(tile, keys);
    for (int64_t d = 0; d < p_.value_dim; ++d) {
      const float* words = now_->v() + d / kBroadcasts * kBroadcasts * steps + d % kBroadcasts;
      for (int v = 0; v < kRowVectors; ++v) {
        float* o = tile.o + d * kQueryRows + v * kLanes;
        V sum = hn::Mul(hn::Load(f, o), hn::Load(f, rescale + v * kLanes));
        for (int64_t step = 0; step < steps; ++step) {
          const V word = hn::And(hn::Set(f, words[step * kBroadcasts]), SeenWord(seen, step, v));
          sum = A::MulAdd(word, hn::Load(f, probabilities_ + step * kQueryRows + v * kLanes), sum);
        }
        hn::Store(sum, f, o);
      }
    }
  }

  // All ones in the elements of a word whose keys the rows of vector v see.
  static V SeenWord(const SeenKeys& seen, int64_t step, int v) {
    const auto element = [&](int64_t key) { return hn::VecFromMask(i32, seen.Mask(key, v)); };
    if constexpr (A::kPack == 1) {
      return hn::BitCast(f, element(step));
    } else {
      return hn::BitCast(f, hn::Or(hn::And(element(2 * step), hn::Set(i32, 0xffff)),
                                   hn::AndNot(hn::Set(i32, 0xffff), element(2 * step + 1))));
    }
  }

  // Divides by the denominator, writes output rows, LSE and bound.
  void Finish(const TileState& tile) {
    const QueryTile& query = *tile.tile;
    Transpose(tile.o);
    for (int64_t r = 0; r < query.rows(); ++r) {
      const RowTotal total =
          FinishRow(p_, query.head, score_unit_,
                    {tile.rows.m[r], tile.rows.l[r], tile.rows.skipped_m[r], tile.rows.skipped[r]});
      float* row = out_ + r * p_.value_dim;
      for (int64_t d = 0; d < p_.value_dim; ++d)
        row[d] = total.inverse == 0 ? 0 : row[d] * total.inverse;
      WriteRow(p_, query, r, row, total);
    }
  }

  // out_[row][d] = o[d][row].
  HWY_NOINLINE void Transpose(const float* o) {
    const hn::Repartition<double, F> pairs;
    alignas(64) float rows[4][kLanes];  // row 4 * block + i of four d in block `block` of rows[i]
    for (int64_t d = 0; d < p_.value_dim; d += 4) {
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
          std::memcpy(out_ + (first + r) * p_.value_dim + d, rows[r % 4] + r / 4 * 4, 16);
      }
    }
  }

  KeyTile<A> key_tiles_[2];
  TileState tiles_[kUnitTiles];
  const Problem& p_;
  const PrefillUnit& unit_;
  Totals& totals_;
  int64_t depth_;  // words a query or key
  int64_t kv_head_;
  float *scores_, *probabilities_, *row_words_;
  float* out_;  // [kQueryRows][value_dim]
  KeyTile<A>*now_ = &key_tiles_[0], *next_ = &key_tiles_[1];
  int64_t rows_a_step_;  // of the next key tile, copied at every block of scores
  ScoreUnit score_unit_;
  bool has_next_ = false;
  bool values_used_ = true, values_ahead_ = true;  // by this key tile, by the one before
};

template <typename A>
void Prefill(const Problem& p, const PrefillUnit& unit, Totals& totals, float* scratch) {
  PrefillWalk<A>(p, unit, totals, scratch).Run();
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
