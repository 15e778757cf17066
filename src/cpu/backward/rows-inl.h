// What backward needs to know of each query row before its weights.
#if defined(BLASST_CPU_BACKWARD_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_BACKWARD_ROWS_INL_H_
#undef BLASST_CPU_BACKWARD_ROWS_INL_H_
#else
#define BLASST_CPU_BACKWARD_ROWS_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/backward/plan.h"
#include "cpu/backward/staging-inl.h"
#include "cpu/plan.h"
#include "cpu/tile/product-inl.h"
#include "cpu/tile/score-inl.h"
#include "cpu/tile/softmax-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// The LSE of a query tile's rows again, from the scores that its weights will come from.
template <typename A>
class FindLse {
 public:
  FindLse(const BackwardPlan& plan, const BackwardTile& tile, float* scratch)
      : plan_(plan), p_(plan.problem.forward), tile_(tile), stride_(staged_stride(p_.head_dim)) {
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    q_ = take(kQueryRows * stride_);
    columns_ = take(kKeys * p_.head_dim);
    scores_ = take(kQueryRows * kKeys);
    k_ = take(stride_);
  }

  // Row by row.
  void Run(double* lse) {
    const QueryTile& query = tile_.query;
    std::fill_n(q_, kQueryRows * stride_, 0.0f);
    for (int64_t r = 0; r < query.rows(); ++r)
      A::Stage(p_.query(query.request, query.position_of(r), query.head), p_.head_dim,
               q_ + r * stride_);
    std::array<RowSum, kQueryRows> rows;
    for (int64_t j = tile_.key_tiles.begin; j < tile_.key_tiles.end; ++j) {
      if (!plan_.kept(tile_, j)) continue;
      Score(j);
      for (int64_t r = 0; r < query.rows(); ++r) Add(j, r, rows[r]);
    }
    for (int64_t r = 0; r < query.rows(); ++r) lse[r] = TotalOf(p_, unit_, query.head, rows[r]).lse;
  }

 private:
  // scores[row][key], soft-capped.
  void Score(int64_t j) {
    const QueryTile& query = tile_.query;
    const int64_t keys = std::min<int64_t>(kKeys, p_.requests[query.request].keys - j * kKeys);
    for (int64_t key = 0; key < keys; ++key) {
      A::Stage(p_.key(query.request, j * kKeys + key, query.head / p_.group()), p_.head_dim, k_);
      StageColumn(k_, p_.head_dim, key, columns_);
    }
    for (int64_t panel = 0; panel < keys; panel += kPanel) {
      for (int64_t row = 0; row < query.rows(); row += kBroadcasts) {
        Accumulators sums;
        Clear(sums);
        Multiply<A>(q_ + row * stride_, stride_, 1, columns_ + panel * p_.head_dim, kPanel,
                    p_.head_dim, sums);
        for (int b = 0; b < kBroadcasts; ++b) {
          for (int v = 0; v < kPanelVectors; ++v) {
            const V score = CapScore(unit_, sums[b][v]);
            hn::Store(score, f, scores_ + (row + b) * kKeys + panel + v * kLanes);
          }
        }
      }
    }
  }

  // Adds what row r sees of key tile j.
  void Add(int64_t j, int64_t r, RowSum& row) const {
    const Range seen = intersect(p_.row_keys(tile_.query, r), {j * kKeys, (j + 1) * kKeys});
    const float* scores = scores_ + r * kKeys;
    const std::span<const float> seen_scores(scores + seen.begin % kKeys, seen.size());
    for (const float s : seen_scores) {
      if (!(s > row.m)) continue;
      row.l *= std::exp2((row.m - s) * unit_.log2);
      row.m = s;
    }
    for (const float s : seen_scores)
      if (s > -kInf) row.l += std::exp2((s - row.m) * unit_.log2);
  }

  const BackwardPlan& plan_;
  const Problem& p_;
  const BackwardTile& tile_;
  const int64_t stride_;  // of staged queries
  const ScoreUnit unit_{p_.scale, p_.softcap};
  float *q_, *columns_, *scores_, *k_;
};

// What the reported LSE of each row lacks: digits, where it is large.
template <typename A>
void FindLseRest(const BackwardPlan& plan, const BackwardTile& tile, float* scratch) {
  constexpr float kLarge = 1024;  // from here on half a unit in the last place shows in gradients
  constexpr double kRounding = 0x1p-20;  // beyond it, the LSE is not one that prefill reported
  const float* lse = plan.problem.lse + plan.first_row(tile.query);
  float* rest = plan.lse_rest + plan.first_row(tile.query);
  const int64_t rows = tile.query.rows();
  std::fill_n(rest, rows, 0.0f);
  const auto is_large = [](float x) { return std::abs(x) >= kLarge && std::abs(x) < kInf; };
  if (std::none_of(lse, lse + rows, is_large)) return;
  std::array<double, kQueryRows> found;
  FindLse<A>(plan, tile, scratch).Run(found.data());
  for (int64_t r = 0; r < rows; ++r) {
    const double difference = found[r] - lse[r];
    if (is_large(lse[r]) && std::abs(difference) <= kRounding * std::abs(lse[r]))
      rest[r] = static_cast<float>(difference);
  }
}

// What each row needs before its weights: the rest of its LSE, and delta, what its weights times
// their gradients sum to: out . dout. A gradient of the LSE moves every score by its weight, so it
// joins delta.
template <typename A>
void BackwardRows(const BackwardPlan& plan, const BackwardTile& tile, float* scratch) {
  FindLseRest<A>(plan, tile, scratch);
  const Problem& p = plan.problem.forward;
  const QueryTile& query = tile.query;
  alignas(64) float out[kMaxDim], dout[kMaxDim];
  const hn::CappedTag<float, 8> f8;
  for (int64_t r = 0; r < query.rows(); ++r) {
    const int64_t position = query.position_of(r), row = plan.first_row(query) + r;
    A::Stage(p.output(query.request, position, query.head), p.value_dim, out);
    A::Stage(p.query_row(plan.problem.dout, query.request, position, query.head), p.value_dim,
             dout);
    auto sum = hn::Zero(f8);
    for (int64_t d = 0; d < p.value_dim; d += hn::Lanes(f8))
      sum = hn::MulAdd(hn::Load(f8, out + d), hn::Load(f8, dout + d), sum);
    plan.delta[row] =
        hn::GetLane(hn::SumOfLanes(f8, sum)) - (plan.problem.dlse ? plan.problem.dlse[row] : 0);
  }
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
