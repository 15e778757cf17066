// What a kernel reports of its tiles, beside outputs and LSE: one of two policies, so that the loop
// over tiles need not know what is wanted.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/core/decode/place.cuh"
#include "cuda/core/decode/work.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/skipped_mass.cuh"
#include "cuda/core/tiles.h"

namespace blasst::cuda::decode {

template <typename C>
struct NoReports {
  static constexpr int kColumns = C::kRows / 4;
  __device__ __forceinline__ NoReports(const Params&, const Plan&) {}
  __device__ __forceinline__ void begin_split() {}
  __device__ __forceinline__ void decided(const Item&, const ThreadPlace&, int, bool, bool,
                                          const float (&)[kColumns], const float (&)[kColumns]) {}
  __device__ __forceinline__ void end_split() {}
  __device__ __forceinline__ void fold(bool) {}
  __device__ __forceinline__ SkippedMass of_split(int) const { return SkippedMass::none(); }
  __device__ __forceinline__ SkippedMass of_split_before(int) const { return SkippedMass::none(); }
  __device__ __forceinline__ SkippedMass of_group(int) const { return SkippedMass::none(); }
};

// Tile bits, gaps and the dropped-mass bound.
template <typename C>
class TileReports {
  static constexpr int kColumns = C::kRows / 4;

 public:
  __device__ __forceinline__ TileReports(const Params& p, const Plan& plan)
      : p_(p), plan_(plan), group_(p.heads / p.kv_heads) {}

  __device__ __forceinline__ void begin_split() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) split_[c] = SkippedMass::none();
  }

  // A tile's row maxima, and the running ones before it.
  __device__ __forceinline__ void decided(const Item& item, const ThreadPlace& at, int tile,
                                          bool nan, bool keep,
                                          const float (&tile_maximum)[kColumns],
                                          const float (&maximum)[kColumns]) {
    float gap = -INFINITY;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (at.row(c) < rows_of(item, group_) && tile_maximum[c] > -INFINITY)
        gap = fmaxf(gap, tile_maximum[c] - maximum[c]);
    }
    gap = fmaxf(gap, __shfl_xor_sync(kAllLanes, gap, 1));
    gap = fmaxf(gap, __shfl_xor_sync(kAllLanes, gap, 2));
    if (at.warp == 0) write(item, at, tile, keep, nan ? NAN : gap * plan_.unit_scale);
    if (!keep) add_skipped(item, at, tile, tile_maximum);
  }

  // The split at hand is done; its values may still be on their way.
  __device__ __forceinline__ void end_split() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) before_[c] = split_[c];
  }

  // It joins those of the group's earlier splits.
  __device__ __forceinline__ void fold(bool first) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (first)
        group_mass_[c] = before_[c];
      else
        group_mass_[c].add(before_[c]);
    }
  }

  __device__ __forceinline__ SkippedMass of_split(int column) const { return split_[column]; }
  __device__ __forceinline__ SkippedMass of_split_before(int column) const {
    return before_[column];
  }
  __device__ __forceinline__ SkippedMass of_group(int column) const { return group_mass_[column]; }

 private:
  __device__ __forceinline__ void write(const Item& item, const ThreadPlace& at, int tile,
                                        bool keep, float gap) const {
    if (p_.report.tile_bits && keep && at.lane == 0) {
      unsigned* words = p_.report.tile_bits +
                        (int64_t{item.kv_head} * p_.batch + item.request) * p_.report.tile_words;
      atomicOr(words + tile / 32, 1u << (tile % 32));
    }
    if (!p_.report.gap_histogram) return;
    for (int g = at.lane; g < group_; g += 32)
      atomicAdd(
          &p_.report.gap_histogram[(item.kv_head * group_ + g) * BLASST_GAP_BINS + gap_bin(gap)],
          1ull);
  }

  __device__ __forceinline__ void add_skipped(const Item& item, const ThreadPlace& at, int tile,
                                              const float (&tile_maximum)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (tile_maximum[c] == -INFINITY) continue;  // the row sees no key here
      const Range seen = range_of(p_, item, group_, min(at.row(c), rows_of(item, group_) - 1));
      const int keys = min(seen.end, (tile + 1) * kTileKeys) - max(seen.begin, tile * kTileKeys);
      split_[c].add(tile_maximum[c] * (plan_.unit_scale * kLog2e), static_cast<float>(keys));
    }
  }

  const Params& p_;
  const Plan& plan_;
  const int group_;
  // By column: of the split at hand, of the one before, of the group's splits before that.
  SkippedMass split_[kColumns], before_[kColumns], group_mass_[kColumns];
};

template <typename C>
using Reports = std::conditional_t<C::kReports, TileReports<C>, NoReports<C>>;

}  // namespace blasst::cuda::decode
