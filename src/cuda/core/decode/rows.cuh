// The query rows of a block's work: their scores, decisions and softmax. Four warps share the keys
// of a tile; each thread has some of them, of some of the rows (place.cuh).
#pragma once

#include <cfloat>
#include <cmath>

#include "blasst/blasst.h"
#include "cuda/core/decode/fold.cuh"
#include "cuda/core/decode/params.h"
#include "cuda/core/decode/place.cuh"
#include "cuda/core/decode/reports.cuh"
#include "cuda/core/decode/work.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/ptx.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::decode {

inline constexpr int kWarps = 4;  // that decide together

// Through which the warps trade what each knows of its own keys.
template <int kRows>
struct SharedRows {
  float rows[2][kWarps][kRows];  // maxima of tiles, or sums: they alternate
  alignas(16) int nan[2][kWarps];
};

template <typename C>
class Rows {
 public:
  static constexpr int kScores = C::kRows / 2;   // a thread's
  static constexpr int kColumns = C::kRows / 4;  // query rows a thread has elements of
  using Scores = float[kScores];
  using Columns = float[kColumns];  // a value for each of them

  // Sums over kept keys, relative to the maxima.
  struct Softmax {
    Columns maximum, sum;
  };

  __device__ __forceinline__ Rows(const Params& p, const Plan& plan, SharedRows<C::kRows>& shared)
      : group(p.heads / p.kv_heads),
        log2_scale(plan.unit_scale * kLog2e),
        reports(p, plan),
        p_(p),
        plan_(plan),
        shared_(shared) {}

  // --- items and splits -------------------------------------------------------------------------

  // Of the item; what a thread has of others is no row.
  __device__ __forceinline__ int rows() const { return rows_of(item, group); }

  // After `item` was set.
  __device__ __forceinline__ void begin_item() {
    seen_by_all_ = {range_of(p_, item, group, rows() - 1).begin, range_of(p_, item, group, 0).end};
    first_split_ = item.begin == 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) seed[c] = -INFINITY;
  }

  // Maxima of a thread's own keys, or of all.
  __device__ __forceinline__ void take_seed(const Columns& maximum) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) seed[c] = fmaxf(seed[c], maximum[c]);
  }

  __device__ __forceinline__ void begin_split() {
    seeded_ = !first_split_;
    first_split_ = false;
    dropped = 0;
    // The absolute test may skip the seeds' tiles: sums relative to their maxima could vanish.
    const bool from_seeds = seeded_ && p_.test.kind != BLASST_TEST_ABSOLUTE;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      split.maximum[c] = from_seeds ? seed[c] : -INFINITY;
      if (at.row(c) >= rows()) split.maximum[c] = 0;
      split.sum[c] = 0;
      limit_[c] = -FLT_MAX;
      test_against(c, seeded_ ? fmaxf(split.maximum[c], seed[c]) : split.maximum[c]);
    }
    reports.begin_split();
  }

  // From the keys of each thread to all keys.
  __device__ __forceinline__ void sum_over_keys() {
    Columns& sum = split.sum;
    auto& sums = shared_.rows[buffer_];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step <= 16; step *= 2) sum[c] += __shfl_xor_sync(kAllLanes, sum[c], step);
      if (at.lane < 4) sums[at.warp][at.row(c)] = sum[c];
    }
    meet();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = at.row(c);
      sum[c] = (sums[0][row] + sums[1][row]) + (sums[2][row] + sums[3][row]);
    }
    buffer_ ^= 1;
  }

  // Beside the outputs of the item's next result, of `skipped` skipped tiles; mass_of(column): of
  // those.
  template <typename Mass>
  __device__ __forceinline__ void write_statistics(const Softmax& softmax, int skipped,
                                                   const Mass& mass_of) {
    if (threadIdx.x < 4) {
      float* statistics = plan_.statistics + int64_t{item.slot} * kStatistics * plan_.rows;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int row = at.row(c);
        if (row >= rows()) continue;
        const SkippedMass mass = mass_of(c);
        statistics[row] = softmax.maximum[c];
        statistics[plan_.rows + row] = softmax.sum[c];
        statistics[2 * plan_.rows + row] = mass.maximum;
        statistics[3 * plan_.rows + row] = mass.sum;
      }
    }
    if (threadIdx.x == 0) plan_.dropped[item.slot] = skipped;
    item.slot += p_.kv_heads;
  }

  // --- scores -----------------------------------------------------------------------------------

  // Whether every row sees every key of a tile.
  __device__ __forceinline__ bool seen_by_all(int tile) const {
    const int key0 = tile * kTileKeys;
    return key0 >= seen_by_all_.begin && key0 + kTileKeys <= seen_by_all_.end;
  }

  // Soft cap, mask and the maximum of every row over a thread's keys, NaN left aside, and `largest`
  // the same where NaN is larger than all. For reports, whether there is a NaN. What is no row is
  // all zeros, which an infinite key turns into NaN, and has no say.
  __device__ __forceinline__ bool finish_scores(Scores& s, int tile, Columns& maximum,
                                                Columns& largest) const {
    const bool all_seen = seen_by_all(tile);
    if (!all_seen || p_.softcap > 0) cap_and_mask(s, tile, all_seen);

    bool nan = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float a = s[at.element(c, 0)], b = s[at.element(c, 1)];
      const bool none = !C::kFiniteKeys && at.row(c) >= rows();
      if constexpr (C::kReports) nan |= !none && (isnan(a) || isnan(b));
      maximum[c] = fmaxf(a, b);
      if constexpr (C::kTests) largest[c] = none ? -INFINITY : max_nan(a, b);
    }
    return nan;
  }

  // Row maxima: from the keys of each thread to all keys of the tile; and, for reports, whether
  // there is a NaN. All warps meet.
  __device__ __forceinline__ void share_maxima(Columns& maximum, bool& nan) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step <= 16; step *= 2)
        maximum[c] = fmaxf(maximum[c], __shfl_xor_sync(kAllLanes, maximum[c], step));
    }
    auto& maxima = shared_.rows[buffer_];
    if (at.lane < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 2)
        *reinterpret_cast<float2*>(&maxima[at.warp][at.row(c)]) =
            make_float2(maximum[c], maximum[c + 1]);
    }
    if constexpr (C::kReports) {
      nan = __any_sync(kAllLanes, nan);
      if (at.lane == 0) shared_.nan[buffer_][at.warp] = nan;
    }
    meet();
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 of_warp = *reinterpret_cast<const float2*>(&maxima[w][at.row(c)]);
        maximum[c] = w == 0 ? of_warp.x : fmaxf(maximum[c], of_warp.x);
        maximum[c + 1] = w == 0 ? of_warp.y : fmaxf(maximum[c + 1], of_warp.y);
      }
    }
    if constexpr (C::kReports) {
      const int4 any = *reinterpret_cast<const int4*>(shared_.nan[buffer_]);
      nan = any.x | any.y | any.z | any.w;
    }
    buffer_ ^= 1;
  }

  // --- decision ---------------------------------------------------------------------------------

  // Whether some row wants the tile, by `largest` of a thread's own keys. `maximum`, over these,
  // becomes that over all keys if it is kept or a seed, or tiles are reported. All warps meet.
  __device__ __forceinline__ bool decide(int tile, bool is_seed, Columns& maximum,
                                         const Columns& largest, bool nan) {
    Columns running;  // for reports
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      running[c] = seeded_ ? fmaxf(split.maximum[c], seed[c]) : split.maximum[c];
    const bool keep = wanted(largest);
    if (keep || is_seed || C::kReports) share_maxima(maximum, nan);
    if (is_seed) take_seed(maximum);
    reports.decided(item, at, tile, nan, keep, maximum, running);
    if (!keep) ++dropped;
    return keep;
  }

  // --- kept tiles -------------------------------------------------------------------------------

  // Probabilities in place of the scores of a kept tile; `factor` brings earlier results to the new
  // maximum. Returns whether that changes anything in the warp.
  __device__ __forceinline__ bool weigh(Scores& s, const Columns& tile_maximum, Columns& factor) {
    bool grown = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float base = raise_maximum(c, tile_maximum[c], factor[c]);
      split.sum[c] = __fmaf_rn(split.sum[c], factor[c], exponentials(s, c, base));
      grown |= factor[c] != 1;
    }
    return __any_sync(kAllLanes, grown);
  }

  // The same, relative to the tile's own maxima and times 2^one; `weight` brings what is made of
  // them to the new maximum.
  __device__ __forceinline__ bool weigh_apart(Scores& s, const Columns& tile_maximum, int one,
                                              Columns& factor, Columns& weight) {
    bool grown = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float base = raise_maximum(c, tile_maximum[c], factor[c]);
      const float own = __fmaf_rn(tile_maximum[c], log2_scale, static_cast<float>(-one));
      weight[c] = exp2_approx(__fsub_rn(own, base));
      const float sum = exponentials(s, c, tile_maximum[c] == -INFINITY ? 0.0f : own);
      split.sum[c] = __fmaf_rn(split.sum[c], factor[c], __fmul_rn(sum, weight[c]));
      grown |= factor[c] != 1;
    }
    return __any_sync(kAllLanes, grown);
  }

  // Earlier outputs of kPanels times 64 value elements, times the factor.
  template <int kPanels>
  static __device__ __forceinline__ void rescale(float (&o)[kPanels][kScores],
                                                 const Columns& factor) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) o[i][ThreadPlace::element(c, half)] *= factor[c];
  }

  // The result of a split joins that of its group's earlier ones; the first's is `total` already,
  // but for the outputs. `o` becomes the next one's.
  template <int kPanels>
  __device__ __forceinline__ void fold(bool first, const Softmax& result,
                                       float (&o)[kPanels][kScores], Softmax& total,
                                       float (&total_o)[kPanels][kScores]) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const FoldWeights add(total.maximum[c], result.maximum[c], log2_scale);
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int x = at.element(c, half);
          total_o[i][x] = first ? o[i][x] : add(total_o[i][x], o[i][x]);
          o[i][x] = 0;
        }
      if (first) continue;
      total.maximum[c] = add.maximum;
      total.sum[c] = add(total.sum[c], result.sum[c]);
    }
  }

  const ThreadPlace at;
  const int group;  // query heads of a KV head
  const float log2_scale;
  Reports<C> reports;

  typename C::Work item;
  Columns below;  // skip_limit() of each row: INFINITY for what is none
  Columns seed;
  Softmax split;  // of the split at hand
  int dropped;    // its tiles

 private:
  // All threads that have scores.
  static __device__ __forceinline__ void meet() { ptx::named_barrier_sync(1, 32 * kWarps); }

  // A row's new maximum in the exponentials' units, 0 for none; `factor` brings what is relative to
  // the one before to it.
  __device__ __forceinline__ float raise_maximum(int column, float tile_maximum, float& factor) {
    float& running = split.maximum[column];
    const float maximum = fmaxf(running, tile_maximum);
    const float base = maximum == -INFINITY ? 0.0f : __fmul_rn(maximum, log2_scale);
    factor = exp2_approx(__fsub_rn(__fmul_rn(running, log2_scale), base));
    running = maximum;
    if constexpr (C::kTests) test_against(column, tile_maximum);
    return base;
  }

  // In place of a row's scores; returns their sum.
  __device__ __forceinline__ float exponentials(Scores& s, int column, float base) const {
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& x = s[at.element(column, half)];
      x = exp2_approx(__fmaf_rn(x, log2_scale, -base));
      sum = half == 0 ? x : __fadd_rn(sum, x);
    }
    return sum;
  }

  __device__ __forceinline__ void cap_and_mask(Scores& s, int tile, bool all_seen) const {
    if (p_.softcap > 0) {
#pragma unroll
      for (int x = 0; x < kScores; ++x) s[x] = p_.softcap * tanhf(p_.scale * s[x] / p_.softcap);
    }
    if (all_seen) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const Range seen = range_of(p_, item, group, min(at.row(c), rows() - 1));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = tile * kTileKeys + at.key(half);
        if (key < seen.begin || key >= seen.end) s[at.element(c, half)] = -INFINITY;
      }
    }
  }

  // A tile that every thread would skip for its own keys is skipped: a row's largest score is one
  // of them. A row's first scores, and NaN, are wanted.
  __device__ __forceinline__ bool wanted(const Columns& largest) const {
    if constexpr (!C::kTests) {
      return true;
    } else {
      // Without branches, which would take longer than what they leave out.
      bool skip = true;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) skip &= largest[c] < limit_[c];
      return __any_sync(kAllLanes, !ptx::named_barrier_all(1, 32 * kWarps, skip));
    }
  }

  // From here on tiles are tested against this maximum, too.
  __device__ __forceinline__ void test_against(int column, float maximum) {
    limit_[column] = fmaxf(limit_[column], skip_below(p_.test.kind, below[column], maximum));
  }

  const Params& p_;
  const Plan& plan_;
  SharedRows<C::kRows>& shared_;
  Columns limit_;  // skip_below() of the running maximum, which the seeds are part of
  int buffer_ = 0;
  Range seen_by_all_;  // keys that every row sees
  bool first_split_;   // of the visit, is the next to begin
  bool seeded_;        // the split at hand lies behind the seeds
};

}  // namespace blasst::cuda::decode
