// Backward of one unit: key tile by key tile, the query tiles that kept it.
//
// Lanes are keys for the two products that make scores and their gradients, so that only K and V
// are transposed, once for all query tiles; the three products that add to gradients take queries
// and keys as they lie, a broadcast weight at a time. No row maximum is needed: the forward's LSE
// turns scores into probabilities. Where it is so large that float32 cost it digits, they are found
// again.
#if defined(BLASST_CPU_BACKWARD_WALK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_BACKWARD_WALK_INL_H_
#undef BLASST_CPU_BACKWARD_WALK_INL_H_
#else
#define BLASST_CPU_BACKWARD_WALK_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/backward/plan.h"
#include "cpu/backward/staging-inl.h"
#include "cpu/plan.h"
#include "cpu/tile/exp-inl.h"
#include "cpu/tile/product-inl.h"
#include "cpu/tile/score-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

template <typename A>
class BackwardWalk {
  static_assert(A::kPack == 1, "weights and sums are float32");

 public:
  BackwardWalk(const BackwardPlan& plan, const BackwardUnit& unit, float* scratch)
      : plan_(plan),
        b_(plan.problem),
        p_(b_.forward),
        unit_(unit),
        qk_stride_(staged_stride(p_.head_dim)),
        v_stride_(staged_stride(p_.value_dim)) {
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    q_ = take(kQueryRows * qk_stride_);
    dout_ = take(kQueryRows * v_stride_);
    k_ = take(kKeys * qk_stride_);
    dk_ = take(kKeys * qk_stride_);
    dv_ = take(kKeys * v_stride_);
    k_columns_ = take(kKeys * p_.head_dim);
    v_columns_ = take(kKeys * p_.value_dim);
    weights_ = take(kQueryRows * kKeys);
    dscores_ = take(kQueryRows * kKeys);
    for (float** row : {&lse_, &lse_rest_, &delta_}) *row = take(kQueryRows);
  }

  void Run() {
    for (const BackwardTile& tile : unit_.tiles)
      std::fill_n(plan_.dq_of(tile.query, unit_.stripe), tile.query.rows() * padded(p_.head_dim),
                  0.0f);
    for (int64_t j = unit_.key_tiles.begin; j < unit_.key_tiles.end; ++j) {
      std::fill_n(dk_, kKeys * qk_stride_, 0.0f);
      std::fill_n(dv_, kKeys * v_stride_, 0.0f);
      bool staged = false;
      for (const BackwardTile& tile : unit_.tiles) {
        if (!plan_.kept(tile, j)) continue;
        if (!std::exchange(staged, true)) StageKeys(j);
        Visit(tile, j);
      }
      for (int64_t key = 0; key < Keys(j); ++key) {
        StoreFloats(A::kDType, dk_ + key * qk_stride_, p_.head_dim,
                    p_.key_row(b_.dk, unit_.request, j * kKeys + key, unit_.kv_head));
        StoreFloats(A::kDType, dv_ + key * v_stride_, p_.value_dim,
                    p_.key_row(b_.dv, unit_.request, j * kKeys + key, unit_.kv_head));
      }
    }
  }

 private:
  int64_t Keys(int64_t j) const {
    return std::min<int64_t>(kKeys, p_.requests[unit_.request].keys - j * kKeys);
  }

  void StageKeys(int64_t j) {
    float* row = dout_;  // free between query tiles
    const int64_t keys = Keys(j);
    for (int64_t key = 0; key < kKeys; ++key) {
      float* k = k_ + key * qk_stride_;
      if (key < keys) {
        StageRow<A>(p_.key(unit_.request, j * kKeys + key, unit_.kv_head), p_.head_dim, qk_stride_,
                    k);
        A::Stage(p_.value(unit_.request, j * kKeys + key, unit_.kv_head), p_.value_dim, row);
      } else {
        std::fill_n(k, qk_stride_, 0.0f);
        std::fill_n(row, p_.value_dim, 0.0f);
      }
      StageColumn(k, p_.head_dim, key, k_columns_);
      StageColumn(row, p_.value_dim, key, v_columns_);
    }
  }

  // Rows beyond the tile's, up to whole broadcasts, get no weight: their LSE is infinite.
  void StageQueries(const QueryTile& tile) {
    rows_ = hwy::RoundUpTo(tile.rows(), kBroadcasts);
    const int64_t first = plan_.first_row(tile);
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const int64_t position = tile.position_of(r);
      StageRow<A>(p_.query(tile.request, position, tile.head), p_.head_dim, qk_stride_,
                  q_ + r * qk_stride_);
      StageRow<A>(p_.query_row(b_.dout, tile.request, position, tile.head), p_.value_dim, v_stride_,
                  dout_ + r * v_stride_);
      // A row that has seen nothing but -inf has no weights either.
      const float lse = b_.lse[first + r];
      lse_[r] = lse == -kInf ? kInf : lse;
      lse_rest_[r] = plan_.lse_rest[first + r];
      delta_[r] = plan_.delta[first + r];
    }
    std::fill(q_ + tile.rows() * qk_stride_, q_ + rows_ * qk_stride_, 0.0f);
    std::fill(dout_ + tile.rows() * v_stride_, dout_ + rows_ * v_stride_, 0.0f);
    std::fill(lse_ + tile.rows(), lse_ + rows_, kInf);
    std::fill(lse_rest_ + tile.rows(), lse_rest_ + rows_, 0.0f);
    std::fill(delta_ + tile.rows(), delta_ + rows_, 0.0f);
  }

  void Visit(const BackwardTile& tile, int64_t j) {
    StageQueries(tile.query);
    const Range keys{j * kKeys, j * kKeys + Keys(j)};
    const bool boundary =
        keys.begin < tile.inner.begin || keys.end > tile.inner.end || keys.size() < kKeys;
    float* dq = plan_.dq_of(tile.query, unit_.stripe);
    if (!boundary) {
      Weigh<false>();
    } else {
      SeenKeys(tile.query, keys);
      Weigh<true>();
      if (!(LargestMagnitude<A>(q_, rows_ * qk_stride_) < kInf &&
            LargestMagnitude<A>(dout_, rows_ * v_stride_) < kInf &&
            LargestMagnitude<A>(k_, kKeys * qk_stride_) < kInf)) {
        AddWhereSeen(tile.query.rows(), dq);
        return;
      }
    }
    AddToKeys(weights_, dout_, v_stride_, p_.value_dim, dv_);
    AddToKeys(dscores_, q_, qk_stride_, p_.head_dim, dk_);
    AddToQueries(tile.query.rows(), dq);
  }

  // Which keys of the tile each row sees.
  void SeenKeys(const QueryTile& tile, Range keys) {
    for (int64_t r = 0; r < rows_; ++r) {
      const Range seen = r < tile.rows() ? intersect(p_.row_keys(tile, r), keys) : Range{};
      seen_[r] = seen.empty() ? Range{} : Range{seen.begin - keys.begin, seen.end - keys.begin};
    }
  }

  // weights[row][key] = exp(score - lse), dscores[row][key] = weight * (dout . v - delta) * slope,
  // where slope is d score / d (q . k). Both exactly zero where a row does not see a key.
  template <bool kMasked>
  HWY_NOINLINE void Weigh() {
    const V unit = hn::Set(f, ScoreUnit(p_.scale, p_.softcap).scale), scale = hn::Set(f, p_.scale);
    for (int64_t panel = 0; panel < kKeys; panel += kPanel) {
      for (int64_t row = 0; row < rows_; row += kBroadcasts) {
        Accumulators sums;
        Clear(sums);
        Multiply<A>(q_ + row * qk_stride_, qk_stride_, 1, k_columns_ + panel * p_.head_dim, kPanel,
                    p_.head_dim, sums);
        for (int b = 0; b < kBroadcasts; ++b) {
          const V lse = hn::Set(f, lse_[row + b]), rest = hn::Set(f, lse_rest_[row + b]);
          for (int v = 0; v < kPanelVectors; ++v) {
            const int64_t at = (row + b) * kKeys + panel + v * kLanes;
            V score = sums[b][v];
            if (p_.softcap > 0) {
              const V cap = hn::Set(f, p_.softcap), scaled = hn::Mul(score, scale);
              score = SoftCap(scaled, cap);
              hn::Store(hn::Mul(scale, SoftCapSlope(scaled, cap)), f, dscores_ + at);
            }
            // The multiply-add rounds the difference, not the two large numbers.
            const V above = hn::Sub(hn::MulSub(score, unit, lse), rest);
            const V weight = Exp2(hn::Mul(above, hn::Set(f, static_cast<float>(kLog2e))));
            hn::Store(WhereSeen<kMasked>(weight, row + b, panel + v * kLanes), f, weights_ + at);
          }
        }
        Clear(sums);
        Multiply<A>(dout_ + row * v_stride_, v_stride_, 1, v_columns_ + panel * p_.value_dim,
                    kPanel, p_.value_dim, sums);
        for (int b = 0; b < kBroadcasts; ++b) {
          const V delta = hn::Set(f, delta_[row + b]);
          for (int v = 0; v < kPanelVectors; ++v) {
            const int64_t at = (row + b) * kKeys + panel + v * kLanes;
            const V slope = p_.softcap > 0 ? hn::Load(f, dscores_ + at) : scale;
            const V weight = hn::Load(f, weights_ + at);
            const V dscore = hn::Mul(hn::Mul(weight, slope), hn::Sub(sums[b][v], delta));
            hn::Store(WhereSeen<kMasked>(dscore, row + b, panel + v * kLanes), f, dscores_ + at);
          }
        }
      }
    }
  }

  template <bool kMasked>
  HWY_INLINE V WhereSeen(V x, int64_t row, int64_t key) const {
    if constexpr (!kMasked) return x;
    const auto index = hn::Iota(i32, static_cast<int32_t>(key));
    const auto begin = hn::Set(i32, static_cast<int32_t>(seen_[row].begin));
    const auto end = hn::Set(i32, static_cast<int32_t>(seen_[row].end));
    const auto seen = hn::AndNot(hn::Lt(index, begin), hn::Lt(index, end));
    return hn::IfThenElseZero(hn::RebindMask(f, seen), x);
  }

  // gradients[key] += sum over rows of weights[row][key] * queries[row].
  HWY_NOINLINE void AddToKeys(const float* weights, const float* queries, int64_t stride,
                              int64_t dim, float* gradients) {
    for (int64_t panel = 0; panel < dim; panel += kPanel) {
      for (int64_t key = 0; key < kKeys; key += kBroadcasts)
        AddProduct(weights + key, 1, kKeys, queries + panel, stride, rows_, kBroadcasts,
                   gradients + key * stride + panel, stride);
    }
  }

  // dq[row] += sum over keys of dscores[row][key] * k[key].
  HWY_NOINLINE void AddToQueries(int64_t rows, float* dq) {
    const int64_t stride = padded(p_.head_dim);
    for (int64_t panel = 0; panel < p_.head_dim; panel += kPanel) {
      for (int64_t row = 0; row < rows; row += kBroadcasts)
        AddProduct(dscores_ + row * kKeys, kKeys, 1, k_ + panel, qk_stride_, kKeys,
                   std::min<int64_t>(kBroadcasts, rows - row), dq + row * stride + panel, stride);
    }
  }

  // sums[b] += product, for the first `count` of the block's rows.
  static HWY_INLINE void AddProduct(const float* words, int64_t word_stride, int64_t step_stride,
                                    const float* rows, int64_t row_stride, int64_t depth,
                                    int64_t count, float* to, int64_t to_stride) {
    Accumulators sums;
    Clear(sums);
    Multiply<A>(words, word_stride, step_stride, rows, row_stride, depth, sums);
    for (int b = 0; b < kBroadcasts; ++b) {
      if (b >= count) break;
      for (int v = 0; v < kPanelVectors; ++v) {
        float* at = to + b * to_stride + v * kLanes;
        hn::Store(hn::Add(hn::Load(f, at), sums[b][v]), f, at);
      }
    }
  }

  // The three products where a number that some row must not see is infinite or NaN, which a zero
  // weight would not undo. The same sums in the same order otherwise.
  HWY_NOINLINE void AddWhereSeen(int64_t rows, float* dq) {
    const auto row_sees = [&](int64_t row, int64_t key) {
      return key >= seen_[row].begin && key < seen_[row].end;
    };
    const auto key_seen = [&](int64_t key, int64_t row) { return row_sees(row, key); };
    AddProductWhere(key_seen, weights_, 1, kKeys, dout_, v_stride_, rows_, kKeys, p_.value_dim, dv_,
                    v_stride_);
    AddProductWhere(key_seen, dscores_, 1, kKeys, q_, qk_stride_, rows_, kKeys, p_.head_dim, dk_,
                    qk_stride_);
    AddProductWhere(row_sees, dscores_, kKeys, 1, k_, qk_stride_, kKeys, rows, p_.head_dim, dq,
                    padded(p_.head_dim));
  }

  template <typename Seen>
  static void AddProductWhere(const Seen& seen, const float* words, int64_t word_stride,
                              int64_t step_stride, const float* rows, int64_t row_stride,
                              int64_t depth, int64_t count, int64_t dim, float* to,
                              int64_t to_stride) {
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        V sum = hn::Zero(f);
        for (int64_t step = 0; step < depth; ++step) {
          if (!seen(b, step)) continue;
          const V word = hn::Set(f, words[b * word_stride + step * step_stride]);
          sum = A::MulAdd(word, hn::Load(f, rows + step * row_stride + d), sum);
        }
        float* at = to + b * to_stride + d;
        hn::Store(hn::Add(hn::Load(f, at), sum), f, at);
      }
    }
  }

  const BackwardPlan& plan_;
  const problem::BackwardProblem& b_;
  const Problem& p_;
  const BackwardUnit& unit_;
  int64_t qk_stride_, v_stride_;       // of staged rows
  float *q_, *dout_, *k_, *dk_, *dv_;  // rows of the tiles at hand
  float *k_columns_, *v_columns_;      // [kKeys / kPanel][dim][kPanel]
  float *weights_, *dscores_;          // [kQueryRows][kKeys]
  float *lse_, *lse_rest_, *delta_;    // of each row
  std::array<Range, kQueryRows> seen_;
  int64_t rows_ = 0;  // staged
};

template <typename A>
void Backward(const BackwardPlan& plan, const BackwardUnit& unit, float* scratch) {
  BackwardWalk<A>(plan, unit, scratch).Run();
}

// Adds up the stripes' parts of dq in their order.
template <typename A>
void BackwardFinish(const BackwardPlan& plan, const QueryTile& tile) {
  const Problem& p = plan.problem.forward;
  const int64_t stride = padded(p.head_dim);
  alignas(64) float sum[kMaxDim];
  for (int64_t r = 0; r < tile.rows(); ++r) {
    std::copy_n(plan.dq_of(tile, 0) + r * stride, p.head_dim, sum);
    for (int64_t stripe = 1; stripe < plan.stripes(tile.request); ++stripe) {
      const float* part = plan.dq_of(tile, stripe) + r * stride;
      for (int64_t d = 0; d < p.head_dim; ++d) sum[d] += part[d];
    }
    StoreFloats(A::kDType, sum, p.head_dim,
                p.query_row(plan.problem.dq, tile.request, tile.position_of(r), tile.head));
  }
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
