// The warpgroup that scores, decides and adds.
//
// It walks the tiles that the producer warp streams in. For each: scores S^T = K Q^T, the row
// maxima, the decision. Only when a tile is kept are its values asked for; they are added one to
// three kept tiles later, so that their way from memory is hidden behind the scores in between.
#pragma once

#include <cmath>

#include "blasst/blasst.h"
#include "cuda/core/skipped_mass.cuh"
#include "cuda/sm90/decode/fold.cuh"
#include "cuda/sm90/decode/layout.cuh"
#include "cuda/sm90/decode/mma.cuh"
#include "cuda/sm90/decode/params.h"
#include "cuda/sm90/decode/produce.cuh"
#include "cuda/sm90/decode/schedule.h"
#include "cuda/sm90/ptx.cuh"

namespace blasst::cuda::decode {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kInf = INFINITY;

template <typename T, int kDim, int kRows, Variant kVariant>
class Consumer {
  using L = Layout<kDim, kRows>;
  using Mma = NarrowMma<T, kRows>;
  static constexpr bool kTests = kVariant != Variant::kDense;
  static constexpr bool kReports = kVariant == Variant::kReport;
  static constexpr bool kFolds = adds_splits(kDim, kRows);  // items of several splits
  static constexpr int kScores = kRows / 2;   // accumulators of a 64-row product, a thread
  static constexpr int kColumns = kRows / 4;  // query rows a thread has elements of
  static constexpr int kPanels = L::kPanels;
  static constexpr int kValueStages = L::kValueStages;
  static constexpr unsigned kAll = 0xffffffffu;

 public:
  __device__ __forceinline__ Consumer(const Params& p, const Plan& plan, typename L::Shared& shared,
                                      const CUtensorMap* v_map)
      : p_(p),
        plan_(plan),
        shared_(shared),
        v_map_(v_map),
        warp_(ptx::warp_uniform(threadIdx.x / 32)),
        lane_(threadIdx.x % 32),
        group_(p.heads / p.kv_heads),
        log2_scale_(plan.unit_scale * kLog2e) {}

  __device__ __forceinline__ void run() {
    while (true) {
      const int stage = ring_.stage;
      ptx::mbarrier_wait(address(shared_.tiles_full[stage]), ring_.phase);
      Tile tile;
      if (lane_ == 0) tile = shared_.tiles[stage];
      const int flags = ptx::warp_uniform(tile.flags);
      if (flags & kStop) return;
      tile_ = ptx::warp_uniform(tile.index);
      if (flags & kFirstOfItem) begin_item();
      ptx::mbarrier_wait(address(shared_.keys_full[stage]), ring_.phase);
      float s[kScores], t[kColumns];
      score(s);
      release_keys(flags);
      bool nan = finish_scores(s, t);
      if (flags & kOnlySeed) {
        take_seed(t);
        if (flags & kLastSeed) share_maxima(seed_, nan);
        continue;
      }
      share_maxima(t, nan);
      if (flags & kSeed) take_seed(t);
      if (flags & kFirstOfSplit) begin_split();
      visit(s, t, nan, tile);
      if (flags & kLastOfSplit) end_split();
      if (flags & kLastOfItem) end_item();
    }
  }

 private:
  // --- where a thread's elements are ------------------------------------------------------------

  __device__ __forceinline__ int row_of(int column) const {
    return 8 * (column / 2) + 2 * (lane_ % 4) + column % 2;
  }
  __device__ __forceinline__ int key_of(int half) const {
    return 16 * warp_ + lane_ / 4 + 8 * half;
  }
  static __device__ __forceinline__ constexpr int element(int column, int half) {
    return 4 * (column / 2) + 2 * half + column % 2;
  }

  // The keys that a row sees.
  __device__ __forceinline__ Range range_of(int row) const {
    const int position = item_.keys - p_.query_length + row / group_;
    return {max(0, position - p_.most_distance), min(item_.keys, position - p_.least_distance + 1)};
  }

  // --- items and splits -------------------------------------------------------------------------

  __device__ __forceinline__ void begin_item() {
    const int slot = queries_.stage;
    ptx::mbarrier_wait(address(shared_.queries_full[slot]), queries_.phase);
    item_ = shared_.items[slot];
    seen_by_all_ = {range_of(plan_.rows - 1).begin, range_of(0).end};
    first_split_ = item_.begin == 0;
    total_empty_ = true;
    dropped_ = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      seed_[c] = -kInf;
      if constexpr (kTests) below_[c] = shared_.below[slot][row_of(c)];
    }
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
#pragma unroll
      for (int x = 0; x < kScores; ++x) o_[i][x] = 0;
  }

  // Maxima of a thread's own keys, or of all.
  __device__ __forceinline__ void take_seed(const float (&t)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) seed_[c] = fmaxf(seed_[c], t[c]);
  }

  __device__ __forceinline__ void begin_split() {
    seeded_ = !first_split_;
    first_split_ = false;
    // The absolute test may skip the seeds' tiles: sums relative to their maxima could vanish.
    const bool from_seeds = seeded_ && p_.test != BLASST_TEST_ABSOLUTE;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      m_[c] = from_seeds ? seed_[c] : -kInf;
      if (row_of(c) >= plan_.rows) m_[c] = 0;
      l_[c] = 0;
      if constexpr (kReports) mass_[c] = SkippedMass::none();
    }
  }

  // The running maximum that tiles are tested against.
  __device__ __forceinline__ float running(int column) const {
    return seeded_ ? fmaxf(m_[column], seed_[column]) : m_[column];
  }

  __device__ __forceinline__ void end_split() {
    sum_over_keys();
    if constexpr (kFolds) {
      while (unfolded_ > 0) add_oldest();  // of the split before
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        split_m_[c] = m_[c], split_l_[c] = l_[c];
        if constexpr (kReports) split_mass_[c] = mass_[c];
      }
      unfolded_ = pending_;
      if (unfolded_ == 0) fold();
    }
  }

  // l: from the keys of each thread to all keys.
  __device__ __forceinline__ void sum_over_keys() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step <= 16; step *= 2) l_[c] += __shfl_xor_sync(kAll, l_[c], step);
      if (lane_ < 4) shared_.sums[warp_][row_of(c)] = l_[c];
    }
    ptx::named_barrier_sync(1, kConsumers);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = row_of(c);
      l_[c] = (shared_.sums[0][row] + shared_.sums[1][row]) +
              (shared_.sums[2][row] + shared_.sums[3][row]);
    }
  }

  __device__ __forceinline__ void end_item() {
    while (pending_ > 0) add_oldest();
    if constexpr (kFolds) {
      write(total_, total_m_, total_l_, total_mass_);
    } else {
      write(o_, m_, l_, mass_);
    }
    queries_.next();
  }

  __device__ __forceinline__ void write(const float (&o)[kPanels][kScores],
                                        const float (&m)[kColumns], const float (&l)[kColumns],
                                        const SkippedMass (&mass)[kColumns]) const {
    float* partial = plan_.partial + int64_t{item_.slot} * plan_.rows * kDim;
    float* statistics = plan_.statistics + int64_t{item_.slot} * kStatistics * plan_.rows;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = row_of(c);
      if (row >= plan_.rows) continue;
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          partial[row * kDim + i * kPanel + key_of(half)] = o[i][element(c, half)];
      if (threadIdx.x < 4) {
        statistics[row] = m[c];
        statistics[plan_.rows + row] = l[c];
        statistics[2 * plan_.rows + row] = kReports ? mass[c].maximum : -kInf;
        statistics[3 * plan_.rows + row] = kReports ? mass[c].sum : 0.0f;
      }
    }
    if (threadIdx.x == 0) plan_.dropped[item_.slot] = dropped_;
  }

  // --- scores -----------------------------------------------------------------------------------

  __device__ __forceinline__ void score(float (&s)[kScores]) {
    const uint32_t keys = ptx::shared_address(shared_.keys[ring_.stage]);
    const uint32_t queries = ptx::shared_address(shared_.queries[queries_.stage]);
#pragma unroll
    for (int x = 0; x < kScores; ++x) s[x] = 0;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      const int panel = k / kPanel, bytes = k % kPanel * 2;
      Mma::template step<false>(
          s, ptx::wgmma_descriptor(keys + panel * kPanelBytes + bytes),
          ptx::wgmma_descriptor(queries + panel * kRows * kPanel * 2 + bytes));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin(s);
  }

  // Keys, and after an item's last tile its queries, may be overwritten.
  __device__ __forceinline__ void release_keys(int flags) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(address(shared_.keys_empty[ring_.stage]));
    if (flags & kLastOfItem) ptx::mbarrier_arrive(address(shared_.queries_empty[queries_.stage]));
    ring_.next();
  }

  // Soft cap, mask and the maximum of every row over a thread's keys, NaN left aside. Whether there
  // is a NaN.
  __device__ __forceinline__ bool finish_scores(float (&s)[kScores], float (&t)[kColumns]) {
    if (p_.softcap > 0) {
#pragma unroll
      for (int x = 0; x < kScores; ++x) s[x] = p_.softcap * tanhf(p_.scale * s[x] / p_.softcap);
    }
    const int key0 = tile_ * kTileKeys;
    if (key0 < seen_by_all_.begin || key0 + kTileKeys > seen_by_all_.end) mask(s);

    bool nan = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float a = s[element(c, 0)], b = s[element(c, 1)];
      if constexpr (kTests) nan |= isnan(a) || isnan(b);
      t[c] = fmaxf(a, b);
    }
    return nan;
  }

  // From the keys of each thread to all keys of the tile: the row maxima, and whether there is a
  // NaN.
  __device__ __forceinline__ void share_maxima(float (&t)[kColumns], bool& nan) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step <= 16; step *= 2)
        t[c] = fmaxf(t[c], __shfl_xor_sync(kAll, t[c], step));
    }
    auto& maxima = shared_.maxima[buffer_];
    if (lane_ < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 2)
        *reinterpret_cast<float2*>(&maxima[warp_][row_of(c)]) = make_float2(t[c], t[c + 1]);
    }
    if constexpr (kTests) {
      nan = __any_sync(kAll, nan);
      if (lane_ == 0) shared_.nan[buffer_][warp_] = nan;
    }
    ptx::named_barrier_sync(1, kConsumers);
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) {
        const float2 of_warp = *reinterpret_cast<const float2*>(&maxima[w][row_of(c)]);
        t[c] = w == 0 ? of_warp.x : fmaxf(t[c], of_warp.x);
        t[c + 1] = w == 0 ? of_warp.y : fmaxf(t[c + 1], of_warp.y);
      }
    }
    if constexpr (kTests) {
      const int4 any = *reinterpret_cast<const int4*>(shared_.nan[buffer_]);
      nan = any.x | any.y | any.z | any.w;
    }
    buffer_ ^= 1;
  }

  __device__ __forceinline__ void mask(float (&s)[kScores]) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const Range seen = range_of(min(row_of(c), plan_.rows - 1));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = tile_ * kTileKeys + key_of(half);
        if (key < seen.begin || key >= seen.end) s[element(c, half)] = -kInf;
      }
    }
  }

  // --- decision ---------------------------------------------------------------------------------

  __device__ __forceinline__ void visit(float (&s)[kScores], const float (&t)[kColumns], bool nan,
                                        const Tile& tile) {
    bool keep = true;
    if constexpr (kTests) {
      bool allow = true;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float tested = p_.test == BLASST_TEST_ABSOLUTE ? t[c] : t[c] - running(c);
        allow &= t[c] == -kInf || (running(c) > -kInf && tested < below_[c]);
      }
      keep = ptx::warp_uniform(!__all_sync(kAll, allow) || nan);
    }
    if constexpr (kReports) report(t, nan, keep);
    if (keep) {
      ask_for_values(tile);
      probabilities(s, t);
      values_.next();
      if (++pending_ == kValueStages) add_oldest();
    } else {
      ++dropped_;
      if constexpr (kReports) add_skipped(t);
    }
  }

  __device__ __forceinline__ void report(const float (&t)[kColumns], bool nan, bool keep) const {
    float gap = -kInf;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (row_of(c) < plan_.rows && t[c] > -kInf) gap = fmaxf(gap, t[c] - running(c));
    }
    gap = fmaxf(gap, __shfl_xor_sync(kAll, gap, 1));
    gap = fmaxf(gap, __shfl_xor_sync(kAll, gap, 2));
    if (warp_ != 0) return;
    if (p_.tile_bits && keep && lane_ == 0) {
      unsigned* words =
          p_.tile_bits + (int64_t{item_.kv_head} * p_.batch + item_.request) * p_.tile_words;
      atomicOr(words + tile_ / 32, 1u << (tile_ % 32));
    }
    if (!p_.gap_histogram) return;
    const int bin = gap_bin(nan ? NAN : gap * plan_.unit_scale);
    for (int g = lane_; g < group_; g += 32)
      atomicAdd(&p_.gap_histogram[(item_.kv_head * group_ + g) * BLASST_GAP_BINS + bin], 1ull);
  }

  static __device__ __forceinline__ int gap_bin(float gap) {
    constexpr int inner = BLASST_GAP_BINS - 2;
    constexpr auto range = static_cast<float>(BLASST_GAP_RANGE);
    if (!(gap < 0)) return BLASST_GAP_BINS - 1;  // NaN too
    if (gap < -range) return 0;
    return min(inner, 1 + static_cast<int>((gap + range) * (inner / range)));
  }

  __device__ __forceinline__ void add_skipped(const float (&t)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (t[c] == -kInf) continue;  // the row sees no key here
      const Range seen = range_of(min(row_of(c), plan_.rows - 1));
      const int keys = min(seen.end, (tile_ + 1) * kTileKeys) - max(seen.begin, tile_ * kTileKeys);
      mass_[c].add(t[c] * log2_scale_, static_cast<float>(keys));
    }
  }

  // --- kept tiles -------------------------------------------------------------------------------

  // The stage is free: its last values were added before the barrier that this tile's maxima met
  // at.
  __device__ __forceinline__ void ask_for_values(const Tile& tile) {
    if (warp_ != 0) return;
    const int stage = values_.stage;
    int page = 0;
    if (p_.page_table) {
#pragma unroll
      for (int box = 0; box < kMostBoxes; ++box) {
        const int of_box = ptx::warp_uniform(tile.pages[box]);
        if (box == lane_ / kPanels) page = of_box;
      }
    }
    if (lane_ == 0) shared_.kept[stage] = tile_;
    copy_tile<kPanels>(p_, plan_, v_map_, ptx::shared_address(shared_.values[stage]),
                       shared_.values_full[stage], item_, tile_,
                       boxes_of(p_, plan_, item_.keys, tile_), page, ptx::L2Hint::kFirst);
  }

  // Softmax of the tile, packed into shared memory as [query row, key], and the factor that brings
  // earlier results to the new maximum.
  __device__ __forceinline__ void probabilities(float (&s)[kScores], const float (&t)[kColumns]) {
    const int stage = values_.stage;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float maximum = fmaxf(m_[c], t[c]);
      const float base = maximum == -kInf ? 0.0f : __fmul_rn(maximum, log2_scale_);
      const float factor = ptx::exp2_approx(__fsub_rn(__fmul_rn(m_[c], log2_scale_), base));
      if (threadIdx.x < 4) shared_.factors[stage][row_of(c)] = factor;
      m_[c] = maximum;
      float sum = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& x = s[element(c, half)];
        x = ptx::exp2_approx(__fmaf_rn(x, log2_scale_, -base));
        sum = half == 0 ? x : __fadd_rn(sum, x);
      }
      l_[c] = __fmaf_rn(l_[c], factor, sum);
    }
    const uint32_t base = ptx::shared_address(shared_.probabilities[stage]);
    const int chunk = 2 * warp_ + lane_ / 8 % 2;  // 8 keys
    const auto place = [&](int row) { return base + row * 128 + (chunk ^ row % 8) * 16; };
    const auto pack = [&](int x) { return ptx::pack2<T>(s[x], s[x + 1]); };
    if constexpr (kRows == 8) {
      store_transposed_2(place(lane_ % 8), pack(0), pack(2));
    } else {
#pragma unroll
      for (int j = 0; j < kRows / 8; j += 2)
        store_transposed_4(place(8 * j + lane_ / 16 * 8 + lane_ % 8), pack(4 * j), pack(4 * j + 2),
                           pack(4 * j + 4), pack(4 * j + 6));
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
    float factor[kColumns];
    bool grown = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      factor[c] = shared_.factors[stage][row_of(c)];
      grown |= factor[c] != 1;
    }
    if (__any_sync(kAll, grown)) {
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int half = 0; half < 2; ++half) o_[i][element(c, half)] *= factor[c];
    }
    const uint32_t values = ptx::shared_address(shared_.values[stage]);
    const uint32_t probabilities = ptx::shared_address(shared_.probabilities[stage]);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileKeys; k += 16)
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
        Mma::template step<true>(o_[i],
                                 ptx::wgmma_descriptor(values + i * kPanelBytes + k * kPanel * 2),
                                 ptx::wgmma_descriptor(probabilities + k * 2));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kPanels; ++i) ptx::pin(o_[i]);
  }

  // Values that no row sees may be anything, NaN too, and are multiplied by zero.
  __device__ __forceinline__ void clear_unseen(int stage) {
    const Range seen =
        visible_keys(item_.keys, p_.query_length, p_.least_distance, p_.most_distance);
    const int key0 = shared_.kept[stage] * kTileKeys;
    if (key0 >= seen.begin && key0 + kTileKeys <= seen.end) return;
    constexpr int kChunks = kPanel * 2 / 16;  // of a swizzled row; swizzling stays within it
    for (int x = threadIdx.x; x < kPanels * kTileKeys * kChunks; x += kConsumers) {
      const int key = key0 + x / kChunks % kTileKeys;
      if (key < seen.begin || key >= seen.end)
        reinterpret_cast<int4*>(shared_.values[stage])[x] = make_int4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, kConsumers);
  }

  // The split's result joins those of the item's earlier splits.
  __device__ __forceinline__ void fold() {
    if (total_empty_) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        total_m_[c] = split_m_[c], total_l_[c] = split_l_[c];
        if constexpr (kReports) total_mass_[c] = split_mass_[c];
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const FoldWeights add(total_m_[c], split_m_[c], log2_scale_);
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int x = element(c, half);
          total_[i][x] = total_empty_ ? o_[i][x] : add(total_[i][x], o_[i][x]);
          o_[i][x] = 0;
        }
      if (total_empty_) continue;
      total_m_[c] = add.maximum;
      total_l_[c] = add(total_l_[c], split_l_[c]);
      if constexpr (kReports) total_mass_[c].add(split_mass_[c]);
    }
    total_empty_ = false;
  }

  const Params& p_;
  const Plan& plan_;
  typename L::Shared& shared_;
  const CUtensorMap* v_map_;
  const int warp_, lane_;
  const int group_;  // query heads of a KV head
  const float log2_scale_;

  Ring<L::kKeyStages> ring_;
  Ring<2> queries_;
  int buffer_ = 0;
  Ring<kValueStages> values_, adding_;  // of the next tile to be kept, to be added
  int pending_ = 0;                     // tiles kept, their values not yet added
  int unfolded_ = 0;                    // of them, those of the split before

  Item item_;
  Range seen_by_all_;  // keys that every row sees
  int tile_;
  int dropped_;       // tiles, of this item
  bool first_split_;  // of the visit, is the next to begin
  bool seeded_;       // the split at hand lies behind the seeds
  bool total_empty_;

  // By column: the split at hand, ...
  float m_[kColumns], l_[kColumns];
  SkippedMass mass_[kColumns];  // reports only
  float below_[kColumns], seed_[kColumns];

  float o_[kPanels][kScores];
  // ... the split before, until its last tile is added, and the item's splits before that.
  float split_m_[kColumns], split_l_[kColumns];
  float total_m_[kColumns], total_l_[kColumns];
  SkippedMass split_mass_[kColumns], total_mass_[kColumns];
  float total_[kPanels][kScores];
};

}  // namespace blasst::cuda::decode
