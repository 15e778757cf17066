// What a kernel reports of its tiles, beside outputs and LSE: one of two policies, so that the loop
// over tiles need not know what is wanted.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/core/decode/work.cuh"
#include "cuda/core/fragment.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/online_softmax.cuh"
#include "cuda/core/skipped_mass.cuh"
#include "cuda/core/tiles.h"
#include "cuda/sm90/decode/latent/layout.cuh"

namespace blasst::cuda::decode::latent {

template <typename C>
struct NoReports {
  __device__ __forceinline__ NoReports(const Params&, const Plan&, Shared&) {}
  __device__ __forceinline__ void begin_split() {}
  __device__ __forceinline__ void offer(const Item&, const float (&)[2], const float (&)[2]) {}
  __device__ __forceinline__ void decided(const Item&, int, bool, const float (&)[2]) {}
  __device__ __forceinline__ SkippedMass of_split(int) const { return SkippedMass::none(); }
};

// Tile bits, gaps and the dropped-mass bound.
template <typename C>
class TileReports {
 public:
  __device__ __forceinline__ TileReports(const Params& p, const Plan& plan, Shared& shared)
      : p_(p), plan_(plan), shared_(shared), group_(p.heads / p.kv_heads) {}

  __device__ __forceinline__ void begin_split() {
#pragma unroll
    for (int r = 0; r < 2; ++r) mass_[r] = SkippedMass::none();
  }

  // A tile's row maxima, of the thread's own keys, and the running ones: each warp leaves its rows'
  // largest gap, before the vote.
  __device__ __forceinline__ void offer(const Item& item, const float (&tile_maximum)[2],
                                        const float (&running)[2]) const {
    float gap = -INFINITY;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (at_.row(r) >= rows_of(item, group_) || tile_maximum[r] == -INFINITY) continue;
      // A row's first scores, and NaN, have no finite gap.
      const float g = (tile_maximum[r] - running[r]) * plan_.unit_scale;
      gap = g <= gap ? gap : (g < INFINITY ? g : INFINITY);
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2)
      gap = fmaxf(gap, __shfl_xor_sync(kAllLanes, gap, lanes));
    if (at_.lane == 0) shared_.gap[at_.warp] = gap;
  }

  __device__ __forceinline__ void decided(const Item& item, int tile, bool keep,
                                          const float (&tile_maximum)[2]) {
    if (at_.warp == 0) {
      const float(&of_warp)[4] = shared_.gap;
      write(item, tile, keep, fmaxf(fmaxf(of_warp[0], of_warp[1]), fmaxf(of_warp[2], of_warp[3])));
    }
    // The next tile's gaps are not written before all have read these.
    ptx::named_barrier_sync(kLeft, 128);
    if (!keep) add_skipped(item, tile, tile_maximum);
  }

  __device__ __forceinline__ SkippedMass of_split(int r) const { return mass_[r]; }

 private:
  __device__ __forceinline__ void write(const Item& item, int tile, bool keep, float gap) const {
    if (p_.report.tile_bits && keep && at_.lane == 0) {
      unsigned* words = p_.report.tile_bits +
                        (int64_t{item.kv_head} * p_.batch + item.request) * p_.report.tile_words;
      atomicOr(words + tile / 32, 1u << (tile % 32));
    }
    if (!p_.report.gap_histogram) return;
    for (int g = at_.lane; g < group_; g += 32)
      atomicAdd(
          &p_.report.gap_histogram[(item.kv_head * group_ + g) * BLASST_GAP_BINS + gap_bin(gap)],
          1ull);
  }

  __device__ __forceinline__ void add_skipped(const Item& item, int tile,
                                              const float (&tile_maximum)[2]) {
    float maximum[2] = {tile_maximum[0], tile_maximum[1]};
    quad_maxima(maximum);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (maximum[r] == -INFINITY || at_.row(r) >= rows_of(item, group_)) continue;
      const Range seen = range_of(p_, item, group_, at_.row(r));
      const int keys = min(seen.end, (tile + 1) * kTileKeys) - max(seen.begin, tile * kTileKeys);
      mass_[r].add(maximum[r] * (plan_.unit_scale * kLog2e), static_cast<float>(keys));
    }
  }

  const Params& p_;
  const Plan& plan_;
  Shared& shared_;
  const int group_;
  const ThreadPlace at_;
  SkippedMass mass_[2];
};

template <typename C>
using Reports = std::conditional_t<C::kReports, TileReports<C>, NoReports<C>>;

}  // namespace blasst::cuda::decode::latent
