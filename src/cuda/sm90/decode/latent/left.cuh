// The left warpgroup: scores, decisions and softmax of a block's rows, and the left half of their
// outputs.
#pragma once

#include <cmath>

#include "cuda/core/decode/splits.h"
#include "cuda/core/fragment.cuh"
#include "cuda/core/online_softmax.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/sm90/decode/latent/half.cuh"
#include "cuda/sm90/decode/latent/reports.cuh"
#include "cuda/sm90/decode/queries.cuh"

namespace blasst::cuda::decode::latent {

template <typename C>
class Left {
  using Element = typename C::Element;
  using Scores = float[kTileKeys / 2];
  using Rows = float[2];  // a value for each of the thread's rows

 public:
  __device__ __forceinline__ Left(const Params& p, const Plan& plan, Shared& shared)
      : p_(p),
        plan_(plan),
        shared_(shared),
        group_(p.heads / p.kv_heads),
        reports_(p, plan, shared) {}

  __device__ __forceinline__ void run() {
    Outputs o;
    TileInfo tile = next_tile();
#pragma unroll 1
    for (;;) {
      // 1. What the tile begins.
      const int stage = ring_.stage, flags = tile.flags, index = tile.index;
      if (flags & (kStop | kFirstOfItem)) {
        if (flags & kStop) return send({.kind = Message::kStop});
        begin_item();
      }

      // 2. Its scores, under the values that the right warpgroup adds.
      Scores s;
      score(s);
      Rows maximum;
      finish_scores(s, index, maximum);
      if (flags & (kSeed | kFirstOfSplit | kLastOfItem)) {
        if (flags & kSeed) take_seed(s);
        if (flags & kFirstOfSplit) begin_split(o);
        if (flags & kLastOfItem) arrive(shared_.queries_empty);  // its queries, item, thresholds
      }

      // 3. The decision. A tile that is skipped, or is but a seed, goes back whole.
      const bool more = !(flags & kLastOfItem);
      if (flags & kOnlySeed || !wanted(maximum, index)) {
        if (!(flags & kOnlySeed)) ++dropped_;
        release(shared_, stage, kLeft, at_);
        release(shared_, stage, kRight, at_);
        ring_.next();
        if (more) tile = next_tile();
      } else {
        // 4. Probabilities, for both halves, and the values of this one. Which tile is next, under
        // them; of another item it may not be known yet.
        keep(s, maximum, index, o);
        ring_.next();
        if (more) tile = next_tile();
        finish_values<kLeft>(shared_, stage, at_, o);
      }

      // 5. Ends.
      if (flags & kLastOfSplit) {
        end_split(o);
        if (!more) {
          queries_phase_ ^= 1;
          tile = next_tile();
        }
      }
    }
  }

 private:
  // Waits until the ring's next tile is known, and its rotary piece there.
  __device__ __forceinline__ TileInfo next_tile() const {
    const int stage = ring_.stage;
    ptx::mbarrier_wait(address(shared_.full[stage][kRotary]), ring_.phase);
    const TileInfo& info = shared_.tiles[stage];
    return {ptx::warp_uniform(info.index), ptx::warp_uniform(info.flags)};
  }

  // --- items and splits -------------------------------------------------------------------------

  // Of the item; what a thread has of others is no row.
  __device__ __forceinline__ int rows() const { return rows_of(item_, group_); }

  __device__ __forceinline__ void begin_item() {
    ptx::mbarrier_wait(address(shared_.queries_full), queries_phase_);
    item_ = shared_.item;
    clear_other_queries<Queries, 128>(shared_.queries, rows(), plan_.rows, kLeft);
    seen_by_all_ = {range_of(p_, item_, group_, rows() - 1).begin,
                    range_of(p_, item_, group_, 0).end};
    seen_by_any_ = visible_keys(item_.keys, item_.positions, p_.distances);
    first_split_ = item_.begin == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      seed_[r] = -INFINITY;
      if constexpr (C::kTests) below_[r] = shared_.below[at_.row(r)];
    }
  }

  // The largest scores of a seed, NaN left aside.
  __device__ __forceinline__ void take_seed(const Scores& s) {
    Rows maximum;
    numbers_maxima(s, maximum);
    quad_maxima(maximum);
#pragma unroll
    for (int r = 0; r < 2; ++r) seed_[r] = fmaxf(seed_[r], maximum[r]);
  }

  __device__ __forceinline__ void begin_split(Outputs& o) {
    seeded_ = !first_split_;
    first_split_ = false;
    dropped_ = 0;
    softmax_ = OnlineSoftmax::empty(plan_.unit_scale * kLog2e);
    // The absolute test may skip the seeds' tiles: sums relative to their maxima could vanish.
    const bool from_seeds = seeded_ && p_.test.kind != BLASST_TEST_ABSOLUTE;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (from_seeds) softmax_.maximum[r] = seed_[r];
      if (at_.row(r) >= rows()) softmax_.maximum[r] = 0;
    }
    clear(o);
    reports_.begin_split();
  }

  __device__ __forceinline__ void end_split(const Outputs& o) {
    const int slot = item_.slot;
    send({.kind = Message::kWrite, .slot = slot, .rows = rows()});
    write_outputs<kLeft>(plan_, slot, rows(), at_, o);
    float* statistics = plan_.statistics + int64_t{slot} * kStatistics * plan_.rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at_.row(r);
      const float sum = quad_sum(softmax_.sum[r]);
      if (row >= rows() || at_.lane % 4 != 0) continue;
      const SkippedMass mass = reports_.of_split(r);
      statistics[row] = softmax_.maximum[r];
      statistics[plan_.rows + row] = sum;
      statistics[2 * plan_.rows + row] = mass.maximum;
      statistics[3 * plan_.rows + row] = mass.sum;
    }
    if (threadIdx.x % 128 == 0) plan_.dropped[slot] = dropped_;
    item_.slot += p_.kv_heads;
  }

  // --- scores -----------------------------------------------------------------------------------

  // s = Q K^T of the stage at hand. The rotary piece comes and goes first.
  __device__ __forceinline__ void score(Scores& s) {
    const int stage = ring_.stage;
    const uint64_t q = ptx::wgmma_descriptor(ptx::shared_address(shared_.queries));
    const uint64_t k = ptx::wgmma_descriptor(ptx::shared_address(shared_.latents[stage]));
    using Product = ptx::Wgmma<Element, kTileKeys>;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const auto piece = static_cast<Piece>(i);
      if (piece != kRotary) ptx::mbarrier_wait(address(shared_.full[stage][piece]), ring_.phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < panels(piece) * 4; ++step) {
        const int panel = first_panel(piece) + step / 4, within = step % 4 * 32;
        const uint64_t a = ptx::advance(q, panel * Queries::kPanelBytes + within);
        const uint64_t b = ptx::advance(k, panel * Latents::kPanelBytes + within);
        i == 0 && step == 0 ? Product::first(s, a, b) : Product::add(s, a, b);
      }
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::fence_registers(s);
    release(shared_, stage, kRotary, at_);
  }

  // Soft cap, mask, and the maximum of every row over a thread's keys, NaN if there is one.
  __device__ __forceinline__ void finish_scores(Scores& s, int tile, Rows& maximum) const {
    const int key0 = tile * kTileKeys;
    const bool all_seen = key0 >= seen_by_all_.begin && key0 + kTileKeys <= seen_by_all_.end;
    if (!all_seen || p_.softcap > 0) cap_and_mask(s, key0, all_seen);
    row_maxima(s, maximum);
  }

  __device__ __forceinline__ void cap_and_mask(Scores& s, int key0, bool all_seen) const {
    if (p_.softcap > 0) {
      const float scale = p_.scale / p_.softcap;
      for_each_rolled<4>(s, [&](float x, int, int) { return p_.softcap * tanh_exact(x * scale); });
    }
    if (all_seen) return;
    Range seen[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] = range_of(p_, item_, group_, min(at_.row(r), rows() - 1));
    for_each_rolled<8>(s, [&](float x, int i, int first) {
      const int r = i / 2 % 2, key = key0 + at_.column() + 2 * first + i / 4 * 8 + i % 2;
      return key >= seen[r].begin && key < seen[r].end ? x : -INFINITY;
    });
  }

  // Over a thread's keys, NaN left aside.
  static __device__ __forceinline__ void numbers_maxima(const Scores& s, Rows& maximum) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maximum[r] = -INFINITY;
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j)
        maximum[r] = fmaxf(maximum[r], fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    }
  }

  // --- decision ---------------------------------------------------------------------------------

  // Whether some row wants the tile. A row's first scores, and NaN, are wanted; what is no row has
  // NaN behind an infinite key, and no say.
  __device__ __forceinline__ bool wanted(const Rows& maximum, int tile) {
    Rows running;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      running[r] = seeded_ ? fmaxf(softmax_.maximum[r], seed_[r]) : softmax_.maximum[r];
    reports_.offer(item_, maximum, running);
    bool keep = true;
    if constexpr (C::kTests) {
      bool skip = true;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        skip = skip && (at_.row(r) >= rows() ||
                        maximum[r] < skip_below(p_.test.kind, below_[r], running[r]));
      keep = __any_sync(kAllLanes, !ptx::named_barrier_all(kLeft, 128, skip));
    }
    reports_.decided(item_, tile, keep, maximum);
    return keep;
  }

  // --- kept tiles -------------------------------------------------------------------------------

  __device__ __forceinline__ void keep(Scores& s, Rows& maximum, int tile, Outputs& o) {
    // A thread whose maximum is NaN has numbers, too.
    if (__any_sync(kAllLanes, isnan(maximum[0]) || isnan(maximum[1]))) numbers_maxima(s, maximum);
    quad_maxima(maximum);
    Rows factor;
    const bool moved = softmax_.raise(maximum, factor);
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax_.sum[r] *= factor[r];
    if (moved) scale_rows(o, factor);
    const int key0 = tile * kTileKeys, stage = ring_.stage;
    const Range valid{max(0, seen_by_any_.begin - key0), min(kTileKeys, seen_by_any_.end - key0)};
    clear_unseen<kLeft>(shared_, stage, valid);
    wait_for_answer();
    // The values of the first keys under the exponentials of the others.
    PackedTile p;
    exponentials<Element, 0, 1>(softmax_, s, p);
    start_values<Element, kLeft, 0>(shared_, stage, p, o);
    exponentials<Element, 1, 1>(softmax_, s, p);
    store_probabilities(shared_, at_, p);
    if (at_.lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) shared_.factors[at_.row(r)] = factor[r];
    }
    tell({.kind = Message::kAdd,
          .stage = stage,
          .parity = static_cast<int>(ring_.phase),
          .valid_begin = valid.begin,
          .valid_end = valid.end});
    start_values<Element, kLeft, 1>(shared_, stage, p, o);
  }

  // --- shared memory ----------------------------------------------------------------------------

  __device__ __forceinline__ void arrive(uint64_t& barrier) const {
    ptx::mbarrier_arrive_if(address(barrier), at_.lane == 0);
  }

  // The right warpgroup has read the last message.
  __device__ __forceinline__ void wait_for_answer() {
    ptx::mbarrier_wait(address(shared_.message_empty), message_phase_ ^ 1);
    message_phase_ ^= 1;
  }

  __device__ __forceinline__ void tell(const Message& message) {
    if (threadIdx.x % 128 == 0) shared_.message = message;
    __syncwarp();
    arrive(shared_.message_full);
  }

  __device__ __forceinline__ void send(const Message& message) {
    wait_for_answer();
    tell(message);
  }

  const Params& p_;
  const Plan& plan_;
  Shared& shared_;
  const ThreadPlace at_;
  const int group_;  // query heads that decide together
  Reports<C> reports_;

  Ring<kStages> ring_;
  uint32_t queries_phase_ = 0, message_phase_ = 0;

  Item item_;
  Range seen_by_all_, seen_by_any_;  // keys that every row sees, that some row sees
  bool first_split_;                 // of the visit, is the next to begin
  bool seeded_;                      // the split at hand lies behind the seeds
  int dropped_;                      // tiles, of this split
  Rows below_, seed_;
  OnlineSoftmax softmax_;  // of the split at hand
};

}  // namespace blasst::cuda::decode::latent
