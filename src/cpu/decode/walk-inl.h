// Decode of one split: the query heads that share a KV head are the rows of a tile, and the KV
// heads of a request walk the key tiles side by side.
//
// Memory is the limit. K is streamed once, in the order in which tokens lie in memory, whatever the
// head; V is touched only for kept tiles, fetched while the next tile is scored and used after
// that.
#if defined(BLASST_CPU_DECODE_WALK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_DECODE_WALK_INL_H_
#undef BLASST_CPU_DECODE_WALK_INL_H_
#else
#define BLASST_CPU_DECODE_WALK_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/decode/fetch-inl.h"
#include "cpu/decode/query_tile-inl.h"
#include "cpu/decode/scores-inl.h"
#include "cpu/decode/values-inl.h"
#include "cpu/decode/wide_rows-inl.h"
#include "cpu/plan.h"
#include "cpu/tile/rows-inl.h"
#include "cpu/tile/score-inl.h"
#include "cpu/tile/softmax-inl.h"
#include "cpu/tile/test-inl.h"
#include "cpu/totals.h"
#include "problem/element.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Packs the probabilities of one row; their sum.
template <typename A>
float RowProbabilities(ScoreUnit unit, const float* scores, float base, float* probabilities) {
  alignas(64) float p[kKeys];
  V sum = hn::Zero(f);
  for (int64_t key = 0; key < kKeys; key += kLanes) {
    const V x = Probability(unit, hn::LoadU(f, scores + key), hn::Set(f, base));
    sum = hn::Add(sum, x);
    hn::Store(x, f, p + key);
  }
  A::PackRow(p, kKeys, probabilities);
  return hn::GetLane(hn::SumOfLanes(f, sum));
}

// Turns scores into probabilities relative to the new running maximum, in words of A, and updates m
// and l.
template <typename A>
HWY_NOINLINE void Softmax(const TileRows& rows, const float* scores, float* probabilities) {
  alignas(64) float base[kLanes];
  for (int64_t first = 0; first < rows.count; first += kLanes) {
    hn::Store(Rebase(rows, first), f, base);
    for (int64_t r = first; r < std::min(rows.count, first + kLanes); ++r)
      rows.l[r] = rows.l[r] * rows.rescale[r] + RowProbabilities<A>(rows.unit, scores + r * kKeys,
                                                                    base[r - first],
                                                                    probabilities + r * kKeys);
  }
}

// One query tile on its way. Scores are products of S, sums of values those of A.
template <typename S, typename A>
class DecodeHead {
 public:
  DecodeHead(const Problem& p, const QueryTile& query, Range key_tiles, Totals& totals,
             ValueQueue& queue, float* scratch)
      : p_(p),
        key_tiles_(key_tiles),
        totals_(totals),
        queue_(queue),
        values_are_at_hand_(p.values_lie_in_keys()),
        tile_(DecodeTile::Make<S>(p, query, scratch)),
        wide_k_(p.kv.k.dtype, p.head_dim, scratch),
        wide_v_(p.kv.v.dtype, p.value_dim, scratch),
        outputs_(query.rows(), p.value_dim, scratch),
        scores_(std::exchange(scratch, scratch + query.rows() * kKeys)),
        probabilities_(scratch) {}

  bool Visits(int64_t j) const { return tile_.Visits(j); }

  // The first tile of these positions of the visit that is visited; -1: none.
  int64_t NextVisited(Range positions) const {
    for (int64_t i = positions.begin; i < positions.end; ++i) {
      const int64_t j = problem::nth_tile(p_.order, key_tiles_, i);
      if (Visits(j)) return j;
    }
    return -1;
  }

  // Writes to each of the visit's splits the rows' maxima over the visit's first tiles, of those
  // that lie before it.
  void FindSeeds(const Partial* splits, int64_t count) {
    const TileRows& rows = tile_.rows;
    int seeds = 0;
    for (int64_t split = 0; split < count; ++split) {
      std::copy_n(rows.seed, rows.count, splits[split].seed);
      const Range positions = split_positions(key_tiles_.size(), split);
      for (int64_t i = positions.begin; i < positions.end && seeds < BLASST_SEED_TILES; ++i) {
        const int64_t j = problem::nth_tile(p_.order, key_tiles_, i);
        if (!Visits(j)) continue;
        ++seeds;
        FindRows(p_.kv.k, j, k_rows_);
        Score([](int64_t, int64_t) {});
        Maxima(tile_, tile_.KeysOf(j), scores_);
        for (int64_t r = 0; r < rows.count; ++r) rows.seed[r] = std::max(rows.seed[r], rows.t[r]);
      }
    }
  }

  // The maxima that tiles are tested against, too.
  void TakeSeeds(const Partial& split) {
    std::copy_n(split.seed, tile_.rows.count, tile_.rows.seed);
  }

  // Visits tile j. `next`: the tile after it, whose keys are fetched meanwhile; -1: none.
  void Visit(int64_t j, int64_t next) {
    // 1. Scores and row maxima. The next keys, and values of kept tiles, are fetched meanwhile.
    if (j == next_key_tile_) {
      std::swap(k_rows_, next_k_rows_);
    } else {
      FindRows(p_.kv.k, j, k_rows_);
    }
    next_key_tile_ = next;
    if (next >= 0) FindRows(p_.kv.k, next, next_k_rows_);
    const int64_t k_bytes = p_.head_dim * problem::element_bytes(p_.kv.k.dtype);
    Score([&](int64_t first_row, int64_t key) {
      if (first_row == 0 && next >= 0) {
        for (int i = 0; i < kKeyGroup; ++i) Fetch(next_k_rows_[key + i], 0, k_bytes);
      }
      queue_.AskWhileScoring();
    });
    const bool nan = Maxima(tile_, tile_.KeysOf(j), scores_);

    // 2. The test.
    const bool kept = Decide(tile_.rows, tile_.query, j, nan, totals_);

    // 3. The values of the tile that was kept before have come by now.
    AddPending();

    // 4. Probabilities; values are asked for.
    if (kept) {
      Softmax<A>(tile_.rows, scores_, probabilities_);
      pending_ = j;
      const Range keys = tile_.KeysOf(j);
      FindRows(p_.kv.v, j, v_rows_);
      if (!tile_.rows_differ) v_rows_ = SeenOf(v_rows_, keys, tile_.ranges[0]);
      if (!values_are_at_hand_) queue_.Push(v_rows_);
    } else if (p_.report.dropped_mass_bound) {
      AddSkipped(tile_.rows);
    }
  }

  // Adds the values of the tile that was kept last.
  void AddPending() {
    if (pending_ < 0) return;
    const Range keys = tile_.KeysOf(std::exchange(pending_, -1));
    if (wide_v_.is_needed()) v_rows_ = wide_v_.Of(v_rows_);
    const auto add = [&](auto size, int64_t first, const Rows& values) {
      const float *rescale = tile_.rows.rescale + first, *p = probabilities_ + first * kKeys;
      if (wide_v_.is_needed()) {
        AddValues<typename A::Wide, size()>(outputs_, first, rescale, p, values, queue_);
      } else {
        AddValues<A, size()>(outputs_, first, rescale, p, values, queue_);
      }
    };
    if (tile_.rows_differ && tile_.Boundary(keys)) {
      for (int64_t r = 0; r < tile_.rows.count; ++r)
        add(std::integral_constant<int, 1>(), r, SeenOf(v_rows_, keys, tile_.ranges[r]));
    } else {
      ForRowGroups(tile_.rows.count, [&](auto size, int64_t first) { add(size, first, v_rows_); });
    }
  }

  void WritePartial(const Partial& partial) const {
    for (int64_t r = 0; r < tile_.rows.count; ++r) {
      const RowSum sum = SumOf(tile_.rows, r);
      partial.m[r] = sum.m, partial.l[r] = sum.l;
      partial.skipped_m[r] = sum.skipped_m, partial.skipped[r] = sum.skipped;
      for (int64_t d = 0; d < p_.value_dim; ++d)
        partial.o[r * partial.o_stride + d] = outputs_.Element(r, d);
    }
  }

 private:
  // Where the rows of a tile's keys or values are; zeros behind the last.
  void FindRows(const View& view, int64_t j, Rows& rows) const {
    const Range keys = tile_.KeysOf(j);
    p_.rows_of(view, tile_.query.request, keys, tile_.query.head / p_.group(), rows.data());
    std::fill(rows.begin() + keys.size(), rows.end(), ZeroRow());
  }

  // The rows of a tile's keys; zeros for keys not in `seen`, so that NaN in a masked value stays
  // out.
  static Rows SeenOf(Rows rows, Range keys, Range seen) {
    for (int64_t i = 0; i < keys.size(); ++i) {
      if (keys.begin + i < seen.begin || keys.begin + i >= seen.end) rows[i] = ZeroRow();
    }
    return rows;
  }

  // Products of k_rows_.
  template <typename Between>
  void Score(const Between& between) {
    if (wide_k_.is_needed()) {
      Products<typename S::Wide>(tile_, wide_k_.Of(k_rows_), between, scores_);
    } else {
      Products<S>(tile_, k_rows_, between, scores_);
    }
  }

  const Problem& p_;
  const Range key_tiles_;  // of the whole visit
  Totals& totals_;
  ValueQueue& queue_;
  const bool values_are_at_hand_;  // in the cache, since their keys were scored
  DecodeTile tile_;
  WideRows<S> wide_k_;
  WideRows<A> wide_v_;
  RowOutputs<typename A::Wide> outputs_;
  float *scores_, *probabilities_;  // [rows][kKeys]
  int64_t next_key_tile_ = -1;
  int64_t pending_ = -1;                // kept tile whose values are still to be added
  Rows k_rows_, next_k_rows_, v_rows_;  // of the tile at hand, the next one, pending_
};

template <typename S, typename A>
void DecodeSeeds(const Problem& p, const DecodeUnit& unit, Totals& totals, float* scratch,
                 const Partial* partials) {
  ValueQueue queue(0, 1);
  for (size_t i = 0; i < unit.tiles.size(); ++i) {
    DecodeHead<S, A> head(p, unit.tiles[i], unit.key_tiles, totals, queue, scratch);
    head.FindSeeds(&partials[unit.first_partial(i)], unit.splits);
  }
}

template <typename S, typename A>
void Decode(const Problem& p, const DecodeUnit& unit, Totals& totals, float* scratch,
            const Partial* partials) {
  ValueQueue queue(p.value_dim * problem::element_bytes(p.kv.v.dtype), std::ssize(unit.tiles));
  std::vector<DecodeHead<S, A>> heads;
  heads.reserve(unit.tiles.size());
  const bool seeded = unit.split > 0 && takes_seeds(p);
  for (size_t i = 0; i < unit.tiles.size(); ++i) {
    heads.emplace_back(p, unit.tiles[i], unit.key_tiles, totals, queue, scratch);
    scratch += decode_scratch_floats(p);
    if (seeded) heads.back().TakeSeeds(partials[unit.first_partial(i) + unit.split]);
  }
  for (int64_t i = unit.visit.begin; i < unit.visit.end; ++i) {
    const int64_t j = problem::nth_tile(p.order, unit.key_tiles, i);
    for (DecodeHead<S, A>& head : heads)
      if (head.Visits(j)) head.Visit(j, head.NextVisited({i + 1, unit.visit.end}));
  }
  for (size_t i = 0; i < heads.size(); ++i) {
    heads[i].AddPending();
    heads[i].WritePartial(partials[unit.first_partial(i) + unit.split]);
  }
}

// Joins the splits of a query tile, in their order, and writes its output rows.
inline void Combine(const Problem& p, const QueryTile& tile, const Partial* splits, int64_t count) {
  const ScoreUnit unit(p, tile);
  std::array<float, kMaxDim> out;
  for (int64_t r = 0; r < tile.rows(); ++r) {
    RowSum row;
    for (int64_t i = 0; i < count; ++i) {
      row.m = std::max(row.m, splits[i].m[r]);
      row.skipped_m = std::max(row.skipped_m, splits[i].skipped_m[r]);
    }
    out.fill(0);
    for (int64_t i = 0; i < count; ++i) {
      const Partial& s = splits[i];
      if (s.skipped[r] > 0)
        row.skipped += s.skipped[r] * std::exp2((s.skipped_m[r] - row.skipped_m) * unit.log2);
      if (s.l[r] == 0) continue;  // this split kept nothing for the row
      const float weight = std::exp2((s.m[r] - row.m) * unit.log2);
      row.l += s.l[r] * weight;
      for (int64_t d = 0; d < p.value_dim; ++d) out[d] += s.o[r * s.o_stride + d] * weight;
    }
    FinishRow(p, tile, r, row, out.data());
  }
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
