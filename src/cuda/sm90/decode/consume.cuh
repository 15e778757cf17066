// The warpgroup that scores, decides and adds.
//
// It walks the tiles that the producer warp streams in. For each: scores S^T = K Q^T, the row
// maxima, the decision. Only when a tile is kept are its values asked for; they are added one to
// three kept tiles later, so that their way from memory is hidden behind the scores in between.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/core/decode/fold.cuh"
#include "cuda/core/decode/params.h"
#include "cuda/core/decode/splits.h"
#include "cuda/core/math.cuh"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/decode/layout.cuh"
#include "cuda/sm90/decode/operands.cuh"
#include "cuda/sm90/decode/place.cuh"
#include "cuda/sm90/decode/produce.cuh"
#include "cuda/sm90/decode/reports.cuh"

namespace blasst::cuda::decode {

template <typename C>
class Consumer {
  using L = typename C::Layout;
  static constexpr bool kIn8Bits = L::kIn8Bits;
  using Operands = std::conditional_t<kIn8Bits, WidenedOperands<C>, SharedOperands<C>>;
  static constexpr int kRows = C::kRows;
  static constexpr bool kTests = C::kTests;
  static constexpr bool kFolds = adds_splits(C::kValueDim, kRows);  // items of several splits
  static constexpr int kScores = kRows / 2;          // accumulators of a 64-row product, a thread
  static constexpr int kColumns = kRows / 4;         // query rows a thread has elements of
  static constexpr int kPanels = C::kValueDim / 64;  // of outputs
  static constexpr int kValueStages = L::kValueStages;

  using Scores = float[kScores];
  using Outputs = float[kPanels][kScores];
  using Columns = float[kColumns];  // a value for each of the thread's query rows

  // Sums over kept keys, relative to the maxima.
  struct Softmax {
    Columns maximum, sum;
  };

 public:
  __device__ __forceinline__ Consumer(const Params& p, const Plan& plan, typename L::Shared& shared,
                                      const CUtensorMap* v_map)
      : p_(p),
        plan_(plan),
        shared_(shared),
        v_map_(v_map),
        group_(p.heads / p.kv_heads),
        log2_scale_(plan.unit_scale * kLog2e),
        reports_(p, plan) {}

  __device__ __forceinline__ void run() {
    while (true) {
      // 1. Which tile is next, and what it begins.
      const int stage = ring_.stage;
      ptx::mbarrier_wait(address(shared_.tiles_full[stage]), ring_.phase);
      Tile tile;
      if (at_.lane == 0) tile = shared_.tiles[stage];
      const int flags = ptx::warp_uniform(tile.flags);
      if (flags & kStop) return;
      const int index = ptx::warp_uniform(tile.index);
      if (flags & kFirstOfItem) begin_item();

      // 2. Its scores and their maxima, over the thread's own keys; the stage goes back.
      ptx::mbarrier_wait(address(shared_.keys_full[stage]), ring_.phase);
      Scores s;
      Columns maximum;
      score(s);
      release_keys(flags);
      bool nan = finish_scores(s, index, maximum);

      // 3. A seed of another item gives its maxima and no more.
      if (flags & kOnlySeed) {
        take_seed(maximum);
        if (flags & kLastSeed) share_maxima(seed_, nan);
        continue;
      }

      // 4. The maxima over all keys, and the decision: a kept tile's values are asked for, its
      // probabilities wait for them; values that came in the meantime are added.
      share_maxima(maximum, nan);
      if (flags & kSeed) take_seed(maximum);
      if (flags & kFirstOfSplit) begin_split();
      visit(s, maximum, nan, index, tile);

      // 5. Ends.
      if (flags & kLastOfSplit) end_split();
      if (flags & kLastOfItem) end_item();
    }
  }

 private:
  // --- items and splits -------------------------------------------------------------------------

  __device__ __forceinline__ void begin_item() {
    const int slot = queries_.stage;
    ptx::mbarrier_wait(address(shared_.queries_full[slot]), queries_.phase);
    item_ = shared_.items[slot];
    if constexpr (kIn8Bits) prepare_queries(slot);
    seen_by_all_ = {range_of(p_, item_, group_, plan_.rows - 1).begin,
                    range_of(p_, item_, group_, 0).end};
    first_split_ = item_.begin == 0;
    total_empty_ = true;
    dropped_ = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      seed_[c] = -INFINITY;
      if constexpr (kTests) below_[c] = shared_.below[slot][at_.row(c)];
    }
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
#pragma unroll
      for (int x = 0; x < kScores; ++x) o_[i][x] = 0;
  }

  // The queries as the product wants them, and what makes a product a score.
  __device__ __forceinline__ void prepare_queries(int slot) {
    std::byte* queries = shared_.queries[slot];
    if (plan_.half_queries) {
      Operands::template prepare_queries<__half>(queries, shared_.query_units);
    } else {
      Operands::template prepare_queries<__nv_bfloat16>(queries, shared_.query_units);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      units_[c] = __fmul_rn(shared_.query_units[at_.row(c)], item_.k_scale);
  }

  // Maxima of a thread's own keys, or of all.
  __device__ __forceinline__ void take_seed(const Columns& maximum) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) seed_[c] = fmaxf(seed_[c], maximum[c]);
  }

  __device__ __forceinline__ void begin_split() {
    seeded_ = !first_split_;
    first_split_ = false;
    // The absolute test may skip the seeds' tiles: sums relative to their maxima could vanish.
    const bool from_seeds = seeded_ && p_.test.kind != BLASST_TEST_ABSOLUTE;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      split_.maximum[c] = from_seeds ? seed_[c] : -INFINITY;
      if (at_.row(c) >= plan_.rows) split_.maximum[c] = 0;
      split_.sum[c] = 0;
    }
    reports_.begin_split();
  }

  // The running maxima that tiles are tested against.
  __device__ __forceinline__ void running_maxima(Columns& running) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      running[c] = seeded_ ? fmaxf(split_.maximum[c], seed_[c]) : split_.maximum[c];
  }

  __device__ __forceinline__ void end_split() {
    sum_over_keys(split_.sum);
    if constexpr (kFolds) {
      while (unfolded_ > 0) add_oldest();  // of the split before
      before_ = split_;
      reports_.end_split();
      unfolded_ = pending_;
      if (unfolded_ == 0) fold();
    }
  }

  // From the keys of each thread to all keys.
  __device__ __forceinline__ void sum_over_keys(Columns& sum) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step <= 16; step *= 2) sum[c] += __shfl_xor_sync(kAllLanes, sum[c], step);
      if (at_.lane < 4) shared_.sums[at_.warp][at_.row(c)] = sum[c];
    }
    ptx::named_barrier_sync(1, kConsumers);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = at_.row(c);
      sum[c] = (shared_.sums[0][row] + shared_.sums[1][row]) +
               (shared_.sums[2][row] + shared_.sums[3][row]);
    }
  }

  __device__ __forceinline__ void end_item() {
    while (pending_ > 0) add_oldest();
    if constexpr (kFolds)
      write(total_o_, total_, [&](int column) { return reports_.of_item(column); });
    else
      write(o_, split_, [&](int column) { return reports_.of_split(column); });
    queries_.next();
  }

  template <typename Mass>
  __device__ __forceinline__ void write(const Outputs& o, const Softmax& softmax,
                                        const Mass& mass_of) const {
    float* partial = plan_.partial + int64_t{item_.slot} * plan_.rows * C::kValueDim;
    float* statistics = plan_.statistics + int64_t{item_.slot} * kStatistics * plan_.rows;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = at_.row(c);
      if (row >= plan_.rows) continue;
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          partial[row * C::kValueDim + i * 64 + Operands::value_element(at_, half)] =
              value_scaled(o[i][at_.element(c, half)]);
      if (threadIdx.x < 4) {
        const SkippedMass mass = mass_of(c);
        statistics[row] = softmax.maximum[c];
        statistics[plan_.rows + row] = softmax.sum[c];
        statistics[2 * plan_.rows + row] = mass.maximum;
        statistics[3 * plan_.rows + row] = mass.sum;
      }
    }
    if (threadIdx.x == 0) plan_.dropped[item_.slot] = dropped_;
  }

  __device__ __forceinline__ float value_scaled(float x) const {
    if constexpr (kIn8Bits) return __fmul_rn(x, item_.v_scale);
    return x;
  }

  // --- scores -----------------------------------------------------------------------------------

  __device__ __forceinline__ void score(Scores& s) {
    Operands::scores(at_, s, ptx::shared_address(shared_.keys[ring_.stage]),
                     ptx::shared_address(shared_.queries[queries_.stage]));
    if constexpr (kIn8Bits) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[at_.element(c, half)];
          x = __fmul_rn(x, units_[c]);
        }
    }
  }

  // Keys, and after an item's last tile its queries, may be overwritten.
  __device__ __forceinline__ void release_keys(int flags) {
    __syncwarp();
    if (at_.lane == 0) ptx::mbarrier_arrive(address(shared_.keys_empty[ring_.stage]));
    if (flags & kLastOfItem) ptx::mbarrier_arrive(address(shared_.queries_empty[queries_.stage]));
    ring_.next();
  }

  // Soft cap, mask and the maximum of every row over a thread's keys, NaN left aside. Whether there
  // is a NaN.
  __device__ __forceinline__ bool finish_scores(Scores& s, int tile, Columns& maximum) const {
    if (p_.softcap > 0) {
#pragma unroll
      for (int x = 0; x < kScores; ++x) s[x] = p_.softcap * tanhf(p_.scale * s[x] / p_.softcap);
    }
    const int key0 = tile * kTileKeys;
    if (key0 < seen_by_all_.begin || key0 + kTileKeys > seen_by_all_.end) mask(s, tile);

    bool nan = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float a = s[at_.element(c, 0)], b = s[at_.element(c, 1)];
      if constexpr (kTests) nan |= isnan(a) || isnan(b);
      maximum[c] = fmaxf(a, b);
    }
    return nan;
  }

  __device__ __forceinline__ void mask(Scores& s, int tile) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const Range seen = range_of(p_, item_, group_, min(at_.row(c), plan_.rows - 1));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = tile * kTileKeys + at_.key(half);
        if (key < seen.begin || key >= seen.end) s[at_.element(c, half)] = -INFINITY;
      }
    }
  }

  // From the keys of each thread to all keys of the tile: the row maxima, and whether there is a
  // NaN.
  __device__ __forceinline__ void share_maxima(Columns& maximum, bool& nan) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step <= 16; step *= 2)
        maximum[c] = fmaxf(maximum[c], __shfl_xor_sync(kAllLanes, maximum[c], step));
    }
    auto& maxima = shared_.maxima[buffer_];
    if (at_.lane < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 2)
        *reinterpret_cast<float2*>(&maxima[at_.warp][at_.row(c)]) =
            make_float2(maximum[c], maximum[c + 1]);
    }
    if constexpr (kTests) {
      nan = __any_sync(kAllLanes, nan);
      if (at_.lane == 0) shared_.nan[buffer_][at_.warp] = nan;
    }
    ptx::named_barrier_sync(1, kConsumers);
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) {
        const float2 of_warp = *reinterpret_cast<const float2*>(&maxima[w][at_.row(c)]);
        maximum[c] = w == 0 ? of_warp.x : fmaxf(maximum[c], of_warp.x);
        maximum[c + 1] = w == 0 ? of_warp.y : fmaxf(maximum[c + 1], of_warp.y);
      }
    }
    if constexpr (kTests) {
      const int4 any = *reinterpret_cast<const int4*>(shared_.nan[buffer_]);
      nan = any.x | any.y | any.z | any.w;
    }
    buffer_ ^= 1;
  }

  // --- decision ---------------------------------------------------------------------------------

  __device__ __forceinline__ void visit(Scores& s, const Columns& maximum, bool nan, int index,
                                        const Tile& tile) {
    Columns running;
    running_maxima(running);
    const bool keep = wanted(maximum, running, nan);
    reports_.decided(item_, at_, index, nan, keep, maximum, running);
    if (keep) {
      ask_for_values(index, tile);
      probabilities(s, maximum);
      values_.next();
      if (++pending_ == kValueStages) add_oldest();
    } else {
      ++dropped_;
    }
  }

  // Whether some row wants the tile. A row's first scores, and NaN, are wanted.
  __device__ __forceinline__ bool wanted(const Columns& maximum, const Columns& running,
                                         bool nan) const {
    if constexpr (!kTests) {
      return true;
    } else {
      bool skip = true;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float tested =
            p_.test.kind == BLASST_TEST_ABSOLUTE ? maximum[c] : maximum[c] - running[c];
        skip &= maximum[c] == -INFINITY || (running[c] > -INFINITY && tested < below_[c]);
      }
      return ptx::warp_uniform(!__all_sync(kAllLanes, skip) || nan);
    }
  }

  // --- kept tiles -------------------------------------------------------------------------------

  // The stage is free: its last values were added before the barrier that this tile's maxima met
  // at.
  __device__ __forceinline__ void ask_for_values(int index, const Tile& tile) {
    if (at_.warp != 0) return;
    const int stage = values_.stage;
    int page = 0;
    if (p_.keys.page_table) {
#pragma unroll
      for (int box = 0; box < kMostBoxes; ++box) {
        const int of_box = ptx::warp_uniform(tile.pages[box]);
        if (box == at_.lane / L::Values::kCount) page = of_box;
      }
    }
    if (at_.lane == 0) shared_.kept[stage] = index;
    copy_tile<typename L::Values, L::kCachedBytes>(
        p_, plan_, v_map_, ptx::shared_address(shared_.values[stage]), shared_.values_full[stage],
        item_, index, boxes_of(p_, plan_, item_.keys, index), page, ptx::L2Hint::kFirst);
  }

  // Softmax of the tile, packed into shared memory as [query row, key], and the factor that brings
  // earlier results to the new maximum.
  __device__ __forceinline__ void probabilities(Scores& s, const Columns& tile_maximum) {
    const int stage = values_.stage;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float maximum = fmaxf(split_.maximum[c], tile_maximum[c]);
      const float base = maximum == -INFINITY ? 0.0f : __fmul_rn(maximum, log2_scale_);
      const float factor = exp2_approx(__fsub_rn(__fmul_rn(split_.maximum[c], log2_scale_), base));
      if (threadIdx.x < 4) shared_.factors[stage][at_.row(c)] = factor;
      split_.maximum[c] = maximum;
      float sum = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& x = s[at_.element(c, half)];
        x = exp2_approx(__fmaf_rn(x, log2_scale_, -base));
        sum = half == 0 ? x : __fadd_rn(sum, x);
      }
      split_.sum[c] = __fmaf_rn(split_.sum[c], factor, sum);
    }
    const uint32_t base = ptx::shared_address(shared_.probabilities[stage]);
    const int chunk = 2 * at_.warp + at_.lane / 8 % 2;  // 8 keys
    const auto place = [&](int row) {
      return base + row * kPanelRowBytes + (chunk ^ row % 8) * 16;
    };
    const auto pack = [&](int x) { return pack2<typename C::Element>(s[x], s[x + 1]); };
    if constexpr (kRows == 8) {
      ptx::store_transposed_2(place(at_.lane % 8), pack(0), pack(2));
    } else {
#pragma unroll
      for (int j = 0; j < kRows / 8; j += 2)
        ptx::store_transposed_4(place(8 * j + at_.lane / 16 * 8 + at_.lane % 8), pack(4 * j),
                                pack(4 * j + 2), pack(4 * j + 4), pack(4 * j + 6));
    }
    ptx::fence_proxy_async();
  }

  // Adds the values of the pending tile that was kept first; folds its split if it was the split's
  // last. A barrier of all consumers lies between its probabilities and here.
  __device__ __forceinline__ void add_oldest() {
    add_values(adding_.stage, adding_.phase);
    adding_.next();
    --pending_;
    if constexpr (kFolds) {
      if (unfolded_ > 0 && --unfolded_ == 0) fold();
    }
  }

  __device__ __forceinline__ void add_values(int stage, uint32_t phase) {
    ptx::mbarrier_wait(address(shared_.values_full[stage]), phase);
    clear_unseen(stage);
    Columns factor;
    bool grown = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      factor[c] = shared_.factors[stage][at_.row(c)];
      grown |= factor[c] != 1;
    }
    if (__any_sync(kAllLanes, grown)) {
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int half = 0; half < 2; ++half) o_[i][at_.element(c, half)] *= factor[c];
    }
    Operands::add_values(at_, o_, ptx::shared_address(shared_.values[stage]),
                         ptx::shared_address(shared_.probabilities[stage]));
  }

  // Values that no row sees may be anything, NaN too, and are multiplied by zero.
  __device__ __forceinline__ void clear_unseen(int stage) {
    const Range seen = visible_keys(item_.keys, p_.query_length, p_.distances);
    const int key0 = shared_.kept[stage] * kTileKeys;
    if (key0 >= seen.begin && key0 + kTileKeys <= seen.end) return;
    constexpr int kChunks = L::Values::kRowBytes / 16;  // of a swizzled row, within which it stays
    for (int x = threadIdx.x; x < L::Values::kBytes / 16; x += kConsumers) {
      const int key = key0 + x / kChunks % kTileKeys;
      if (key < seen.begin || key >= seen.end)
        reinterpret_cast<int4*>(shared_.values[stage])[x] = make_int4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, kConsumers);
  }

  // The split's result joins those of the item's earlier splits.
  __device__ __forceinline__ void fold() {
    reports_.fold(total_empty_);
    if (total_empty_) total_ = before_;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const FoldWeights add(total_.maximum[c], before_.maximum[c], log2_scale_);
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int x = at_.element(c, half);
          total_o_[i][x] = total_empty_ ? o_[i][x] : add(total_o_[i][x], o_[i][x]);
          o_[i][x] = 0;
        }
      if (total_empty_) continue;
      total_.maximum[c] = add.maximum;
      total_.sum[c] = add(total_.sum[c], before_.sum[c]);
    }
    total_empty_ = false;
  }

  const Params& p_;
  const Plan& plan_;
  typename L::Shared& shared_;
  const CUtensorMap* v_map_;
  const ThreadPlace at_;
  const int group_;  // query heads of a KV head
  const float log2_scale_;
  Reports<C> reports_;

  Ring<L::kKeyStages> ring_;
  Ring<2> queries_;
  int buffer_ = 0;
  Ring<kValueStages> values_, adding_;  // of the next tile to be kept, to be added
  int pending_ = 0;                     // tiles kept, their values not yet added
  int unfolded_ = 0;                    // of them, those of the split before

  typename L::Work item_;
  Range seen_by_all_;  // keys that every row sees
  int dropped_;        // tiles, of this item
  bool first_split_;   // of the visit, is the next to begin
  bool seeded_;        // the split at hand lies behind the seeds
  bool total_empty_;
  Columns below_, seed_;
  Columns units_;  // of a cache in 8 bits: a score is a product times it

  Softmax split_;   // of the split at hand
  Softmax before_;  // of the one before, until its last tile is added
  Softmax total_;   // of the item's splits before that
  Outputs o_;       // of the oldest split with tiles to be added
  Outputs total_o_;
};

}  // namespace blasst::cuda::decode
