// The warpgroup that scores, decides and adds.
//
// It walks the tiles that the producer warp streams in. For each: scores S^T = K Q^T, the decision,
// a kept tile's row maxima. Only when a tile is kept are its values asked for, of a warp of its own
// where there is room for one; they are added one to three kept tiles later, so that their way from
// memory is hidden behind the scores in between.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/core/decode/params.h"
#include "cuda/core/decode/rows.cuh"
#include "cuda/core/decode/splits.h"
#include "cuda/core/math.cuh"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/decode/layout.cuh"
#include "cuda/sm90/decode/operands.cuh"
#include "cuda/sm90/decode/produce.cuh"
#include "cuda/sm90/decode/queries.cuh"

namespace blasst::cuda::decode {

template <typename C>
class Consumer {
  using L = typename C::Layout;
  using Keys = std::conditional_t<L::kNarrowKeys, ByteKeys<C>, SharedKeys<C>>;
  using Values = std::conditional_t<L::kNarrowValues, ByteValues<C>, SharedValues<C>>;
  static constexpr int kRows = C::kRows;
  static constexpr bool kTests = C::kTests;
  // A split's values may come while the next one is scored, and results of splits be added here.
  static constexpr bool kOverlaps = adds_splits(C::kValueDim, kRows);
  static constexpr int kScores = Rows<C>::kScores;
  static constexpr int kColumns = Rows<C>::kColumns;
  static constexpr int kPanels = C::kValueDim / 64;  // of outputs
  static constexpr int kValueStages = L::kValueStages;

  using Scores = typename Rows<C>::Scores;
  using Outputs = float[kPanels][kScores];
  using Columns = typename Rows<C>::Columns;
  using Softmax = typename Rows<C>::Softmax;

 public:
  __device__ __forceinline__ Consumer(const Params& p, const Plan& plan, typename L::Shared& shared)
      : p_(p), plan_(plan), shared_(shared), rows_(p, plan, shared.rows) {}

  __device__ __forceinline__ void run() {
    clear_outputs();
    while (true) {
      const TileInfo first = next_tile();
      if (first.flags & kStop) return stop();
      begin_item();
      attend(first);
      end_item();
    }
  }

 private:
  // The tiles of an item.
  __device__ __forceinline__ void attend(TileInfo info) {
    for (TileInfo following; true; info = following) {
      const int stage = ring_.stage, index = info.index, flags = info.flags;
      // 1. The tile's scores and their maxima, over the thread's own keys; the stage goes back.
      // Which tile is next is read meanwhile.
      ptx::mbarrier_wait(address(shared_.keys_full[stage]), ring_.phase);
      Scores s;
      Columns maximum, largest;
      score(s);
      name_values(stage);
      release_keys();
      if (!(flags & kLastOfItem)) following = next_tile();
      bool nan = rows_.finish_scores(s, index, maximum, largest);

      if (flags & (kOnlySeed | kFirstOfSplit | kLastOfItem)) {
        // 2. A seed of another item gives its maxima and no more.
        if (flags & kOnlySeed) {
          rows_.take_seed(maximum);
          if (flags & kLastSeed) rows_.share_maxima(rows_.seed, nan);
          continue;
        }
        if (flags & kFirstOfSplit) {
          take_thresholds();
          rows_.begin_split();
        }
        if (flags & kLastOfItem) release_item();
      }

      // 3. The decision: a kept tile's values are asked for, its probabilities wait for them;
      // values that came in the meantime are added.
      if (rows_.decide(index, flags & kSeed, maximum, largest, nan)) {
        ask_for_values();
        keep(s, index, maximum);
      }

      if (flags & kLastOfSplit) {
        end_split();
        if (flags & kLastOfItem) return;
      }
    }
  }

  // --- items and splits -------------------------------------------------------------------------

  // Waits until the ring's next tile is known.
  __device__ __forceinline__ TileInfo next_tile() const {
    const int stage = ring_.stage;
    ptx::mbarrier_wait(address(shared_.tiles_full[stage]), ring_.phase);
    const TileInfo& info = shared_.tiles[stage];
    return {ptx::warp_uniform(info.index), ptx::warp_uniform(info.flags)};
  }

  __device__ __forceinline__ void stop() {
    if (threadIdx.x == 0) shared_.wanted[values_.stage].boxes = 0;
    ask_for_values();
  }

  __device__ __forceinline__ void begin_item() {
    const int slot = queries_.stage;
    ptx::mbarrier_wait(address(shared_.queries_full[slot]), queries_.phase);
    rows_.item = shared_.items[slot];
    clear_other_queries<typename L::Queries, kConsumers>(shared_.queries[slot], rows_.rows(),
                                                         plan_.rows, 1);
    if constexpr (L::kNarrowKeys) split_queries(slot);
    rows_.begin_item();
  }

  // Of the item, which the first split waits for: they come behind its first keys.
  __device__ __forceinline__ void take_thresholds() {
    if constexpr (kTests) {
      const int slot = queries_.stage;
      ptx::mbarrier_wait(address(shared_.below_full[slot]), queries_.phase);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) rows_.below[c] = shared_.below[slot][at_.row(c)];
    }
  }

  __device__ __forceinline__ void clear_outputs() {
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
#pragma unroll
      for (int x = 0; x < kScores; ++x) o_[i][x] = 0;
  }

  // The queries' digits, and what makes a product a score.
  __device__ __forceinline__ void split_queries(int slot) {
    if (plan_.half_queries) {
      Keys::template split_queries<__half>(shared_.queries[slot], shared_.query_digits,
                                           shared_.query_units);
    } else {
      Keys::template split_queries<__nv_bfloat16>(shared_.queries[slot], shared_.query_digits,
                                                  shared_.query_units);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      units_[c] = __fmul_rn(shared_.query_units[at_.row(c)], rows_.item.k_scale);
  }

  __device__ __forceinline__ void end_split() {
    rows_.sum_over_keys();
    if constexpr (kOverlaps) {
      while (unfinished_ > 0) add_oldest();  // of the split before
      store(rows_.split, shared_.before);
      dropped_before_ = rows_.dropped;
      rows_.reports.end_split();
      unfinished_ = pending_;
      if (unfinished_ == 0) finish_split();
    } else {
      while (pending_ > 0) add_oldest();
      write(o_, rows_.split, rows_.dropped,
            [&](int column) { return rows_.reports.of_split(column); });
      clear_outputs();
    }
  }

  // All values of the split before the one at hand are added.
  __device__ __forceinline__ void finish_split() {
    if (rows_.item.result_splits > 1) {
      fold();
      if (++folded_ == rows_.item.result_splits) write_total();
      return;
    }
    write(o_, load(shared_.before), dropped_before_,
          [&](int column) { return rows_.reports.of_split_before(column); });
    clear_outputs();
  }

  __device__ __forceinline__ void end_item() {
    while (pending_ > 0) add_oldest();
    if constexpr (kOverlaps) {
      if (folded_ > 0) write_total();
    }
    queries_.next();
  }

  // The result of a group.
  __device__ __forceinline__ void write_total() {
    write(total_o_, load(shared_.total), total_dropped_,
          [&](int column) { return rows_.reports.of_group(column); });
    folded_ = 0;
  }

  template <typename Mass>
  __device__ __forceinline__ void write(const Outputs& o, const Softmax& softmax, int dropped,
                                        const Mass& mass_of) {
    float* partial = plan_.partial + int64_t{rows_.item.slot} * plan_.rows * C::kValueDim;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = at_.row(c);
      if (row >= rows_.rows()) continue;
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          partial[row * C::kValueDim + i * 64 + Values::value_element(at_, half)] =
              value_scaled(o[i][at_.element(c, half)]);
    }
    rows_.write_statistics(softmax, dropped, mass_of);
  }

  __device__ __forceinline__ float value_scaled(float x) const {
    if constexpr (L::kNarrowValues) return __fmul_rn(x, rows_.item.v_scale);
    return x;
  }

  // --- scores -----------------------------------------------------------------------------------

  __device__ __forceinline__ void score(Scores& s) {
    const uint32_t keys = ptx::shared_address(shared_.keys[ring_.stage]);
    if constexpr (L::kNarrowKeys) {
      Keys::scores(at_, s, keys, ptx::shared_address(shared_.query_digits), units_);
    } else {
      Keys::scores(at_, s, keys, ptx::shared_address(shared_.queries[queries_.stage]));
    }
  }

  // Keys may be overwritten.
  __device__ __forceinline__ void release_keys() {
    __syncwarp();
    if (at_.lane == 0) ptx::mbarrier_arrive(address(shared_.keys_empty[ring_.stage]));
    ring_.next();
  }

  // So may the item's queries and thresholds, which its last tile may be the first to read.
  __device__ __forceinline__ void release_item() {
    ptx::mbarrier_arrive(address(shared_.queries_empty[queries_.stage]));
  }

  // --- kept tiles -------------------------------------------------------------------------------

  // Where the values lie that may be asked for next: those of the tile of a stage of keys.
  __device__ __forceinline__ void name_values(int stage) {
    if (threadIdx.x == 0) shared_.wanted[values_.stage] = shared_.tiles[stage];
  }

  // The stage is free: its last values were added before the barrier of the decision on this
  // tile.
  __device__ __forceinline__ void ask_for_values() {
    if (threadIdx.x == 0) ptx::mbarrier_arrive(address(shared_.values_wanted[values_.stage]));
  }

  // Softmax of the tile, and the factors that bring earlier results, and its own if they are apart,
  // to the new maximum: into shared memory.
  __device__ __forceinline__ void keep(Scores& s, int tile, const Columns& tile_maximum) {
    const int stage = values_.stage;
    Columns factor, weight;
    bool grown;
    if constexpr (L::kNarrowValues) {
      grown = rows_.weigh_apart(s, tile_maximum, Values::kOne, factor, weight);
    } else {
      grown = rows_.weigh(s, tile_maximum, factor);
    }
    const bool special = grown || !rows_.seen_by_all(tile);
    special_ = (special_ & ~(1u << stage)) | unsigned{special} << stage;
    if (threadIdx.x == 0) shared_.kept[stage] = tile;
    if (threadIdx.x < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        shared_.factors[stage][at_.row(c)] = factor[c];
        if constexpr (L::kNarrowValues) shared_.weights[stage][at_.row(c)] = weight[c];
      }
    }
    Values::store_probabilities(at_, s, ptx::shared_address(shared_.probabilities[stage]));
    ptx::fence_proxy_async();
    values_.next();
    if (++pending_ == kValueStages) add_oldest();
  }

  // Adds the values of the pending tile that was kept first; finishes its split if it was the
  // split's last. A barrier of all consumers lies between its probabilities and here.
  __device__ __forceinline__ void add_oldest() {
    add_values(adding_.stage, adding_.phase);
    adding_.next();
    --pending_;
    if constexpr (kOverlaps) {
      if (unfinished_ > 0 && --unfinished_ == 0) finish_split();
    }
  }

  __device__ __forceinline__ void add_values(int stage, uint32_t phase) {
    ptx::mbarrier_wait(address(shared_.values_full[stage]), phase);
    const uint32_t values = ptx::shared_address(shared_.values[stage]);
    const uint32_t probabilities = ptx::shared_address(shared_.probabilities[stage]);
    if (special_ >> stage & 1) {
      clear_unseen(stage);
      Columns factor;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) factor[c] = shared_.factors[stage][at_.row(c)];
      rows_.rescale(o_, factor);
    }
    if constexpr (L::kNarrowValues) {
      Values::add(at_, o_, values, probabilities, shared_.weights[stage]);
    } else {
      Values::add(at_, o_, values, probabilities);
    }
  }

  // Values that no row sees may be anything, NaN too, and are multiplied by zero.
  __device__ __forceinline__ void clear_unseen(int stage) {
    const Range seen = visible_keys(rows_.item.keys, rows_.item.positions, p_.distances);
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

  // The split's result joins those of the group's earlier splits.
  __device__ __forceinline__ void fold() {
    const bool first = folded_ == 0;
    rows_.reports.fold(first);
    const Softmax before = load(shared_.before);
    Softmax total = first ? before : load(shared_.total);
    total_dropped_ = first ? dropped_before_ : total_dropped_ + dropped_before_;
    rows_.fold(first, before, o_, total, total_o_);
    store(total, shared_.total);
  }

  // What registers have no room for lies in shared memory, for each warp apart.
  using Stored = typename L::StoredSoftmax[kWarps];
  __device__ __forceinline__ void store(const Softmax& softmax, Stored& stored) {
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      stored[at_.warp].maximum[at_.row(c)] = softmax.maximum[c];
      stored[at_.warp].sum[at_.row(c)] = softmax.sum[c];
    }
  }
  __device__ __forceinline__ Softmax load(const Stored& stored) const {
    Softmax softmax;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      softmax.maximum[c] = stored[at_.warp].maximum[at_.row(c)];
      softmax.sum[c] = stored[at_.warp].sum[at_.row(c)];
    }
    return softmax;
  }

  const Params& p_;
  const Plan& plan_;
  typename L::Shared& shared_;
  const ThreadPlace at_;
  Rows<C> rows_;

  Ring<L::kKeyStages> ring_;
  Ring<2> queries_;
  Ring<kValueStages> values_, adding_;  // of the next tile to be kept, to be added
  int pending_ = 0;                     // tiles kept, their values not yet added
  int unfinished_ = 0;                  // of them, those of the split before
  unsigned special_ = 0;  // bit of a stage: some row does not see all its keys, or grew by them

  int folded_ = 0;  // splits of the group at hand, where they are added
  Columns units_;   // of keys in 8 bits: a score is a product times it

  // Tiles of the split before the one at hand, until its last tile is added; of the splits of its
  // group before that, where they are added.
  int dropped_before_, total_dropped_;
  Outputs o_;  // of the oldest split with tiles to be added
  Outputs total_o_;
};

}  // namespace blasst::cuda::decode
