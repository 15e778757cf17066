// Decode of one split: the query heads that share a KV head are the rows of a tile, and the KV
// heads of a request walk the key tiles side by side.
//
// Memory is the limit. K is streamed once, in the order in which tokens lie in memory, whatever the
// head; V is touched only for kept tiles, fetched while the next tile is scored and used after
// that.
#if defined(BLASST_CPU_SIMD_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_SIMD_DECODE_INL_H_
#undef BLASST_CPU_SIMD_DECODE_INL_H_
#else
#define BLASST_CPU_SIMD_DECODE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "attention/problem.h"
#include "cpu/plan.h"
#include "cpu/simd/arithmetic-inl.h"
#include "cpu/simd/exp-inl.h"
#include "cpu/simd/finish-inl.h"
#include "cpu/totals.h"

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

inline constexpr int kRowGroup = 4;  // rows that share a pass over a tile's keys or values
inline constexpr int kKeyGroup = 4;  // keys that share a pass over the rows
inline constexpr int kValueVectors =
    HWY_TARGET == HWY_AVX3 ? 4 : 2;  // output vectors of a row in registers

using Rows = std::array<const std::byte*, kKeys>;  // where a tile's keys or values are

// Asks for bytes [begin, end) of a row that is used a tile later: into the second-level cache, for
// the tiles of a unit's heads are more than the first holds.
HWY_INLINE void Fetch(const std::byte* row, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Value rows of kept tiles, waiting to be fetched a few at a time: all at once they would be more
// than a core can ask for, and the rest would come one by one when it is needed.
class ValueQueue {
 public:
  // `heads` take turns, so many visits pass between a tile's test and the use of its values.
  ValueQueue(int64_t row_bytes, int64_t heads)
      : row_bytes_(row_bytes), rows_a_key_group_(std::max<int64_t>(1, kKeyGroup / heads)) {}

  void Push(const Rows& rows) {
    if (next_ == rows_.size()) rows_.clear(), next_ = 0;
    rows_.insert(rows_.end(), rows.begin(), rows.end());
  }

  HWY_INLINE void AskWhileScoring() { Ask(rows_a_key_group_); }

  HWY_INLINE void Ask(int64_t count) {
    for (; count > 0 && next_ < rows_.size(); --count) Fetch(rows_[next_++], 0, row_bytes_);
  }

 private:
  const int64_t row_bytes_, rows_a_key_group_;
  std::vector<const std::byte*> rows_;
  size_t next_ = 0;
};

// One query tile: its queries, softmax state and outputs, and the key tile at hand.
template <typename A>
class DecodeHead {
 public:
  DecodeHead(const Problem& p, const QueryTile& tile, Range key_tiles, Totals& totals,
             ValueQueue& queue, float* scratch)
      : p_(p),
        tile_(tile),
        key_tiles_(key_tiles),
        totals_(totals),
        queue_(queue),
        count_(tile.rows()),
        padded_count_(hwy::RoundUpTo(count_, kLanes)),
        depth_(p.head_dim / A::kPack),
        q_stride_(hwy::RoundUpTo(depth_, kLanes)),
        o_stride_(hwy::RoundUpTo(p.value_dim, A::kPack * kLanes)),
        kv_head_(tile.head / p.group()),
        keys_(p.requests[tile.request].keys),
        score_unit_(p) {
    const auto take = [&](int64_t floats) {
      return std::exchange(scratch, scratch + hwy::RoundUpTo(floats, 16));
    };
    scores_ = take(count_ * kKeys);
    probabilities_ = take(count_ * kKeys);
    q_ = take(count_ * q_stride_);
    o_ = take(count_ * o_stride_);
    for (float** row : {&m_, &t_, &l_, &skipped_m_, &skipped_, &rescale_, &below_, &seen_, &seed_})
      *row = take(padded_count_);
    Begin();
  }

  bool Visits(int64_t j) const {
    return p_.block_visible(tile_, j) &&
           (!p_.mask.bands || attention::any_visible(ranges_, KeysOf(j)));
  }

  // The first tile of these positions of the visit that is visited; -1: none.
  int64_t NextVisited(Range positions) const {
    for (int64_t i = positions.begin; i < positions.end; ++i) {
      const int64_t j = attention::nth_tile(p_.order, key_tiles_, i);
      if (Visits(j)) return j;
    }
    return -1;
  }

  // Writes to each of the visit's splits the rows' maxima over the visit's first tiles, of those
  // that lie before it.
  void FindSeeds(const Partial* splits, int64_t count) {
    int seeds = 0;
    for (int64_t split = 0; split < count; ++split) {
      std::copy_n(seed_, count_, splits[split].seed);
      const int64_t end = std::min(key_tiles_.size(), (split + 1) * kSplitTiles);
      for (int64_t i = split * kSplitTiles; i < end && seeds < BLASST_SEED_TILES; ++i) {
        const int64_t j = attention::nth_tile(p_.order, key_tiles_, i);
        if (!Visits(j)) continue;
        ++seeds;
        FindRows(p_.kv.k, KeysOf(j), k_rows_);
        Score();
        Maxima(KeysOf(j));
        for (int64_t r = 0; r < count_; ++r) seed_[r] = std::max(seed_[r], t_[r]);
      }
    }
  }

  // The maxima that tiles are tested against, too.
  void TakeSeeds(const Partial& split) { std::copy_n(split.seed, count_, seed_); }

  // Visits tile j. `next`: the tile after it, whose keys are fetched meanwhile; -1: none.
  void Visit(int64_t j, int64_t next) {
    if (j == next_key_tile_) {
      std::swap(k_rows_, next_k_rows_);
    } else {
      FindRows(p_.kv.k, KeysOf(j), k_rows_);
    }
    next_key_tile_ = next;
    if (next >= 0) FindRows(p_.kv.k, KeysOf(next), next_k_rows_);

    Score();
    const Range keys = KeysOf(j);
    const bool nan = Maxima(keys);
    const bool kept = Keep() || nan;
    totals_.count(tile_, j, kept, totals_.wants_gaps() ? Gap(nan) : 0);
    if (totals_.wants_maxima())
      totals_.record(tile_, j,
                     nan ? std::numeric_limits<float>::quiet_NaN()
                         : *std::max_element(t_, t_ + count_) * score_unit_.scale);
    AddPending();
    if (kept) {
      Softmax();
      pending_ = j;
      FindValues(j, rows_differ_ ? keys : intersect(keys, ranges_[0]));
      queue_.Push(v_rows_);
    } else if (p_.report.dropped_mass_bound) {
      AddBound();
    }
  }

  // Adds the values of the tile that was kept last.
  void AddPending() {
    if (pending_ < 0) return;
    const int64_t j = std::exchange(pending_, -1);
    if (rows_differ_ && Boundary(KeysOf(j))) {
      for (int64_t r = 0; r < count_; ++r) {
        FindValues(j, intersect(KeysOf(j), ranges_[r]));
        AddRows<1>(r);
      }
      return;
    }
    for (int64_t r = 0; r < count_; r += kRowGroup) {
      switch (std::min<int64_t>(kRowGroup, count_ - r)) {
        case 1:
          AddRows<1>(r);
          break;
        case 2:
          AddRows<2>(r);
          break;
        case 3:
          AddRows<3>(r);
          break;
        default:
          AddRows<4>(r);
      }
    }
  }

  void WritePartial(const Partial& partial) const {
    constexpr int64_t kBlock = A::kPack * kLanes;
    for (int64_t r = 0; r < count_; ++r) {
      partial.m[r] = m_[r];
      partial.l[r] = l_[r];
      partial.skipped_m[r] = skipped_m_[r];
      partial.skipped[r] = skipped_[r];
      for (int64_t d = 0; d < p_.value_dim; ++d) {
        const int64_t at = d / kBlock * kBlock + A::Lane(static_cast<int>(d % kBlock));
        partial.o[r * partial.o_stride + d] = o_[r * o_stride_ + at];
      }
    }
  }

 private:
  static constexpr int64_t kBytes = A::kDType == BLASST_FLOAT32 ? 4 : 2;  // an element

  void Begin() {
    const TileShape shape = decode_shape(p_);
    ranges_.resize(count_);
    std::fill_n(q_, count_ * q_stride_, 0.0f);
    std::fill_n(o_, count_ * o_stride_, 0.0f);
    for (int64_t r = 0; r < padded_count_; ++r) {
      m_[r] = t_[r] = seed_[r] = skipped_m_[r] = -kInf;
      l_[r] = skipped_[r] = seen_[r] = 0;
      below_[r] = kInf;
      if (r >= count_) continue;
      ranges_[r] = p_.row_keys(tile_, r);
      rows_differ_ |= ranges_[r].begin != ranges_[0].begin || ranges_[r].end != ranges_[0].end;
      below_[r] =
          static_cast<float>(p_.skip_below(tile_, tile_.head_of(r), shape) / score_unit_.scale);
      A::Stage(p_.query(tile_.request, tile_.position_of(r), tile_.head_of(r)), p_.head_dim,
               q_ + r * q_stride_);
    }
  }

  Range KeysOf(int64_t j) const { return {j * kKeys, std::min<int64_t>(keys_, (j + 1) * kKeys)}; }

  static const std::byte* ZeroRow() {
    alignas(float) static constexpr std::array<std::byte, kMaxDim * sizeof(float)> zeros{};
    return zeros.data();
  }

  // Where the rows of a tile's keys are; zeros behind the last.
  void FindRows(const View& view, Range keys, Rows& rows) const {
    p_.rows_of(view, tile_.request, keys, kv_head_, rows.data());
    std::fill(rows.begin() + keys.size(), rows.end(), ZeroRow());
  }

  // Values of tile j; zeros for keys not in `seen`, so that NaN in a masked value stays out.
  void FindValues(int64_t j, Range seen) {
    const Range keys = KeysOf(j);
    FindRows(p_.kv.v, keys, v_rows_);
    for (int64_t i = 0; i < keys.size(); ++i) {
      if (keys.begin + i < seen.begin || keys.begin + i >= seen.end) v_rows_[i] = ZeroRow();
    }
  }

  bool Boundary(Range keys) const {
    return keys.size() < kKeys || std::ranges::any_of(ranges_, [&](Range row) {
             return row.begin > keys.begin || row.end < keys.end;
           });
  }

  // scores[row][key] = q . k.
  HWY_NOINLINE void Score() {
    for (int64_t r = 0; r < count_; r += kRowGroup) {
      const bool fetch = r == 0 && next_key_tile_ >= 0;
      switch (std::min<int64_t>(kRowGroup, count_ - r)) {
        case 1:
          ScoreRows<1>(r, fetch);
          break;
        case 2:
          ScoreRows<2>(r, fetch);
          break;
        case 3:
          ScoreRows<3>(r, fetch);
          break;
        default:
          ScoreRows<4>(r, fetch);
      }
    }
  }

  template <int kRows>
  HWY_INLINE void ScoreRows(int64_t first, bool fetch) {
    const hn::FixedTag<float, 4> four;
    const float* q = q_ + first * q_stride_;
    for (int64_t key = 0; key < kKeys; key += kKeyGroup) {
      if (fetch) {
        for (int i = 0; i < kKeyGroup; ++i) Fetch(next_k_rows_[key + i], 0, p_.head_dim * kBytes);
      }
      queue_.AskWhileScoring();
      V sums[kRows][kKeyGroup];
      for (auto& row : sums)
        for (V& x : row) x = hn::Zero(f);
      for (int64_t d = 0; d < depth_; d += kLanes) {
        V k[kKeyGroup];
        for (int i = 0; i < kKeyGroup; ++i) {
          const std::byte* row = k_rows_[key + i];
          k[i] = HWY_LIKELY(d + kLanes <= depth_) ? A::LoadWords(row, d) : LoadTail(row, d);
        }
        for (int r = 0; r < kRows; ++r) {
          const V row = hn::LoadU(f, q + r * q_stride_ + d);
          for (int i = 0; i < kKeyGroup; ++i) sums[r][i] = A::MulAdd(row, k[i], sums[r][i]);
        }
      }
      for (int r = 0; r < kRows; ++r)
        hn::StoreU(SumFour(sums[r]), four, scores_ + (first + r) * kKeys + key);
    }
  }

  // The last words of a key, with zeros behind them.
  V LoadTail(const std::byte* row, int64_t at) const {
    alignas(64) float words[kLanes] = {};
    A::Stage(row + at * A::kPack * kBytes, (depth_ - at) * A::kPack, words);
    return hn::Load(f, words);
  }

  // Soft cap, mask, then each row's maximum, NaN left aside. Whether a row that counts has a NaN.
  HWY_NOINLINE bool Maxima(Range keys) {
    const bool boundary = Boundary(keys);
    bool nan = false;
    for (int64_t r = 0; r < count_; ++r) {
      float* scores = scores_ + r * kKeys;
      const Range seen = intersect(ranges_[r], keys);
      V most = hn::Set(f, -kInf);
      for (int64_t key = 0; key < kKeys; key += kLanes) {
        V s = hn::LoadU(f, scores + key);
        if (p_.softcap > 0) s = SoftCap(hn::Mul(s, hn::Set(f, p_.scale)), hn::Set(f, p_.softcap));
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
        if (boundary || p_.softcap > 0 || nan) hn::StoreU(s, f, scores + key);
        most = hn::IfThenElse(hn::Gt(s, most), s, most);
      }
      t_[r] = hn::GetLane(hn::MaxOfLanes(f, most));
      seen_[r] = static_cast<float>(seen.size());
    }
    return nan;
  }

  // What tiles are tested against. Outputs are summed relative to m_ alone, so that their bits do
  // not depend on whether there is a test.
  V TestedMaxima(int64_t r) const { return hn::Max(hn::LoadU(f, m_ + r), hn::LoadU(f, seed_ + r)); }

  // The tile test, as in prefill, with a threshold a row.
  bool Keep() const {
    const V none = hn::Set(f, -kInf);
    bool keep = false;
    for (int64_t r = 0; r < padded_count_; r += kLanes) {
      const V t = hn::LoadU(f, t_ + r), m = TestedMaxima(r);
      const V tested = p_.test.kind == BLASST_TEST_ABSOLUTE ? t : hn::Sub(t, m);
      const M low = hn::And(hn::Lt(tested, hn::LoadU(f, below_ + r)), hn::Gt(m, none));
      keep |= !hn::AllTrue(f, hn::Or(low, hn::Eq(t, none)));
    }
    return keep;
  }

  double Gap(bool nan) const {
    if (nan) return std::numeric_limits<double>::quiet_NaN();
    double gap = -kInf;
    for (int64_t r = 0; r < count_; ++r) {
      if (t_[r] > -kInf) gap = std::max(gap, double{t_[r]} - std::max(m_[r], seed_[r]));
    }
    return gap * score_unit_.scale;
  }

  void AddBound() {
    for (int64_t r = 0; r < padded_count_; r += kLanes)
      AddSkipped(score_unit_, hn::LoadU(f, t_ + r), hn::LoadU(f, seen_ + r), skipped_m_ + r,
                 skipped_ + r);
  }

  HWY_NOINLINE void Softmax() {
    const V scale = hn::Set(f, score_unit_.log2), none = hn::Set(f, -kInf);
    alignas(64) float base[kLanes];
    for (int64_t first = 0; first < count_; first += kLanes) {
      const V old_m = hn::LoadU(f, m_ + first);
      const V m = hn::Max(old_m, hn::LoadU(f, t_ + first));
      const V base_v = hn::IfThenZeroElse(hn::Eq(m, none), m);
      hn::StoreU(m, f, m_ + first);
      hn::StoreU(Exp2(hn::Mul(hn::Sub(old_m, base_v), scale)), f, rescale_ + first);
      hn::Store(base_v, f, base);
      for (int64_t r = first; r < std::min(count_, first + kLanes); ++r)
        l_[r] = l_[r] * rescale_[r] + RowProbabilities(r, base[r - first]);
    }
  }

  // Packs the probabilities of one row; their sum.
  float RowProbabilities(int64_t row, float base) {
    const float* scores = scores_ + row * kKeys;
    alignas(64) float p[kKeys];
    V sum = hn::Zero(f);
    for (int64_t key = 0; key < kKeys; key += kLanes) {
      const V x = Exp2(hn::Mul(hn::Sub(hn::LoadU(f, scores + key), hn::Set(f, base)),
                               hn::Set(f, score_unit_.log2)));
      sum = hn::Add(sum, x);
      hn::Store(x, f, p + key);
    }
    A::PackRow(p, kKeys, probabilities_ + row * kKeys);
    return hn::GetLane(hn::SumOfLanes(f, sum));
  }

  template <int kRows>
  HWY_NOINLINE void AddRows(int64_t first) {
    constexpr int64_t kBlock = A::kPack * kLanes;  // elements of one LoadValues
    constexpr int kBlocks = kValueVectors / A::kPack;
    int64_t d = 0;
    for (; d + kBlocks * kBlock <= p_.value_dim; d += kBlocks * kBlock)
      AddBlocks<kRows, kBlocks, false>(first, d);
    for (; d + kBlock <= p_.value_dim; d += kBlock) AddBlocks<kRows, 1, false>(first, d);
    if (d < p_.value_dim) AddBlocks<kRows, 1, true>(first, d);
  }

  // o[row][d..] = rescale * o + sum over keys of p * v, for kBlocks blocks of elements; kTail: a
  // last, short one.
  template <int kRows, int kBlocks, bool kTail>
  HWY_INLINE void AddBlocks(int64_t first, int64_t d) {
    constexpr int kVectors = kBlocks * A::kPack;
    V sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      const V rescale = hn::Set(f, rescale_[first + r]);
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = hn::Mul(hn::LoadU(f, o_ + (first + r) * o_stride_ + d + v * kLanes), rescale);
    }
    // Over all blocks, as many rows are asked for as are added.
    const int64_t asked = attention::ceil_div(A::kPack * kVectors * kLanes, p_.value_dim);
    for (int64_t step = 0; step < kKeys / A::kPack; ++step) {
      const std::byte* const* rows = v_rows_.data() + step * A::kPack;
      queue_.Ask(asked);
      V words[kVectors];
      if constexpr (kTail) {
        LoadValuesTail(rows, d, words);
      } else {
        for (int b = 0; b < kBlocks; ++b)
          A::LoadValues(rows, d + b * A::kPack * kLanes, words + b * A::kPack);
      }
      for (int r = 0; r < kRows; ++r) {
        const V p = hn::Set(f, probabilities_[(first + r) * kKeys + step]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = A::MulAdd(p, words[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v)
        hn::StoreU(sums[r][v], f, o_ + (first + r) * o_stride_ + d + v * kLanes);
    }
  }

  // The elements from d on, padded with zeros to a block.
  void LoadValuesTail(const std::byte* const* rows, int64_t d, V* words) const {
    constexpr int64_t kBytes = A::kDType == BLASST_FLOAT32 ? 4 : 2;
    alignas(64) std::byte padded[A::kPack][A::kPack * kLanes * kBytes] = {};
    const std::byte* padded_rows[A::kPack];
    for (int i = 0; i < A::kPack; ++i) {
      std::memcpy(padded[i], rows[i] + d * kBytes, (p_.value_dim - d) * kBytes);
      padded_rows[i] = padded[i];
    }
    A::LoadValues(padded_rows, 0, words);
  }

  const Problem& p_;
  const QueryTile& tile_;
  const Range key_tiles_;  // of the whole visit
  Totals& totals_;
  ValueQueue& queue_;
  const int64_t count_, padded_count_;  // rows
  const int64_t depth_;                 // words a key
  const int64_t q_stride_, o_stride_;
  const int64_t kv_head_, keys_;
  const ScoreUnit score_unit_;
  float *scores_, *probabilities_, *q_, *o_;
  float *m_, *t_, *l_, *skipped_m_, *skipped_, *rescale_, *below_, *seen_, *seed_;  // a row each
  std::vector<Range> ranges_;  // keys that a row sees
  bool rows_differ_ = false;
  int64_t next_key_tile_ = -1;
  int64_t pending_ = -1;                // kept tile whose values are still to be added
  Rows k_rows_, next_k_rows_, v_rows_;  // of the tile at hand, the next one, pending_
};

template <typename A>
void DecodeSeeds(const Problem& p, const DecodeUnit& unit, Totals& totals, float* scratch,
                 const Partial* partials) {
  ValueQueue queue(0, 1);
  for (size_t i = 0; i < unit.tiles.size(); ++i) {
    DecodeHead<A> head(p, unit.tiles[i], unit.key_tiles, totals, queue, scratch);
    head.FindSeeds(&partials[unit.first_partial(i)], unit.splits);
  }
}

template <typename A>
void Decode(const Problem& p, const DecodeUnit& unit, Totals& totals, float* scratch,
            const Partial* partials) {
  ValueQueue queue(p.value_dim * attention::element_bytes(p.dtype), std::ssize(unit.tiles));
  std::vector<DecodeHead<A>> heads;
  heads.reserve(unit.tiles.size());
  const bool seeded = unit.split > 0 && takes_seeds(p);
  for (size_t i = 0; i < unit.tiles.size(); ++i) {
    heads.emplace_back(p, unit.tiles[i], unit.key_tiles, totals, queue, scratch);
    scratch += decode_scratch_floats(p);
    if (seeded) heads.back().TakeSeeds(partials[unit.first_partial(i) + unit.split]);
  }
  for (int64_t i = unit.visit.begin; i < unit.visit.end; ++i) {
    const int64_t j = attention::nth_tile(p.order, unit.key_tiles, i);
    for (DecodeHead<A>& head : heads)
      if (head.Visits(j)) head.Visit(j, head.NextVisited({i + 1, unit.visit.end}));
  }
  for (size_t i = 0; i < heads.size(); ++i) {
    heads[i].AddPending();
    heads[i].WritePartial(partials[unit.first_partial(i) + unit.split]);
  }
}

// Joins the splits of a query tile, in their order, and writes its output rows.
inline void Combine(const Problem& p, const QueryTile& tile, const Partial* splits, int64_t count) {
  const ScoreUnit unit(p);
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
    const RowTotal total = FinishRow(p, tile.head_of(r), unit, row);
    for (int64_t d = 0; d < p.value_dim; ++d)
      out[d] = total.inverse == 0 ? 0 : out[d] * total.inverse;
    WriteRow(p, tile, r, out.data(), total);
  }
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
