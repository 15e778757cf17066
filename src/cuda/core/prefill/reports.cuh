// What a kernel reports of its tiles, beside outputs and LSE. One of three policies, so that the
// loop over tiles need not know what is wanted. Their calls, in order:
//   begin     before an item's first tile
//   offer     a tile has scores, before the query tile's warps vote on it
//   decided   after the vote
//   row       one of the thread's rows is finished
//   finish    an item is
//
// C::Place says where the thread's two rows are: tile() of the item's query tiles, strip() of the
// tile's four times 16 rows, rank() among the 128 threads that would have one strip a warp. Rank 0
// speaks for its tile.
#pragma once

#include <type_traits>

#include "cuda/core/online_softmax.cuh"
#include "cuda/core/prefill/visit.cuh"
#include "cuda/core/skipped_mass.cuh"
#include "cuda/core/tiles.h"

namespace blasst::cuda::prefill {

// The largest scores of a tile in a thread's rows, at the level that callers mean.
struct TileMaxima {
  float of_row[2];
};

inline constexpr int kRanks = 128;  // of a query tile

// Nothing.
template <typename C>
struct NoReports {
  __device__ __forceinline__ NoReports(const Params&, typename C::Shared&, typename C::Place) {}
  __device__ __forceinline__ void begin(const Work&) {}
  __device__ __forceinline__ void offer(const Visit&, const float (&)[2], TileMaxima,
                                        const OnlineSoftmax&) {}
  __device__ __forceinline__ void decided(const Work&, const Visit&, bool, TileMaxima,
                                          const OnlineSoftmax&) {}
  __device__ __forceinline__ void row(const Work&, int, int64_t, const RowEnd&) {}
  __device__ __forceinline__ void finish(const Work&) {}
};

// How many tiles could be visited, how many of them were skipped, and the bits of those that were
// kept: next to free, and all that a backward pass needs.
template <typename C>
class CountReports {
 public:
  __device__ __forceinline__ CountReports(const Params& p, typename C::Shared&,
                                          typename C::Place at)
      : p_(p), at_(at) {}
  __device__ __forceinline__ void begin(const Work& work) {
    kept_ = 0;
    row_of_bits_ = -1;
    if (!p_.report.tile_bits || at_.rank() != 0 || query_tile_of(work, at_.tile()).rows <= 0)
      return;
    row_of_bits_ = static_cast<int>(tile_row(work));
    for (int word = 0; word < p_.report.tile_words; ++word) *bits(word) = 0;
  }
  __device__ __forceinline__ void offer(const Visit&, const float (&)[2], TileMaxima,
                                        const OnlineSoftmax&) {}
  __device__ __forceinline__ void decided(const Work& work, const Visit& visit, bool keep,
                                          TileMaxima, const OnlineSoftmax&) {
    kept_ += keep;
    // A tile that is not masked is seen by all rows.
    if (keep && row_of_bits_ >= 0 && (!visit.masked || is_visible(work, visit.tile)))
      atomicOr(bits(visit.tile / 32), 1u << visit.tile % 32);
  }
  __device__ __forceinline__ void row(const Work&, int, int64_t, const RowEnd&) {}
  __device__ __forceinline__ void finish(const Work& work) {
    const QueryTile q = query_tile_of(work, at_.tile());
    if (at_.rank() != 0 || q.rows <= 0) return;
    const Range visible = visible_tiles<C::kKeys>(work, q);
    const int64_t cell = int64_t{work.request} * p_.heads + work.head;
    const int visitable = visible.end - visible.begin;
    if (p_.report.visitable) atomicAdd(p_.report.visitable + cell, 1ull * visitable);
    if (p_.report.skipped) atomicAdd(p_.report.skipped + cell, 1ull * (visitable - kept_));
  }

 protected:
  // Where this query tile's rows stand among the query tiles of all heads and requests.
  __device__ __forceinline__ int64_t tile_row(const Work& work) const {
    return int64_t{work.head} * work.query_tiles + work.query_tile + at_.tile();
  }
  // Whether a row of the query tile sees it; the item's other rows may see more.
  __device__ __forceinline__ bool is_visible(const Work& work, int tile) const {
    const Range visible = visible_tiles<C::kKeys>(work, query_tile_of(work, at_.tile()));
    return tile >= visible.begin && tile < visible.end;
  }

  const Params& p_;
  const typename C::Place at_;

 private:
  __device__ __forceinline__ unsigned* bits(int word) const {
    return p_.report.tile_bits + int64_t{row_of_bits_} * p_.report.tile_words + word;
  }

  int kept_;         // tiles of this item
  int row_of_bits_;  // its query tile's; -1: not wanted, or another thread's to write
};

// That, and maxima, gaps and the dropped-mass bound.
template <typename C>
class TileReports : public CountReports<C> {
  using Counts = CountReports<C>;
  using Counts::at_, Counts::p_, Counts::is_visible, Counts::tile_row;

 public:
  __device__ __forceinline__ TileReports(const Params& p, typename C::Shared& s,
                                         typename C::Place at)
      : Counts(p, s, at), s_(s) {}

  __device__ __forceinline__ void begin(const Work& work) {
    Counts::begin(work);
    const QueryTile q = query_tile_of(work, at_.tile());
    if (p_.report.tile_maxima && q.rows > 0)
      for (int64_t tile = at_.rank(); tile < p_.report.tile_maxima_stride; tile += kRanks)
        maxima_of(work)[tile] = -INFINITY;
#pragma unroll
    for (int r = 0; r < 2; ++r) mass_[r] = SkippedMass::none();
  }

  // Each strip leaves its rows' largest gap, in natural logarithms, and their largest score.
  __device__ __forceinline__ void offer(const Visit& visit, const float (&tile_maximum)[2],
                                        TileMaxima leveled, const OnlineSoftmax& softmax) {
    const float to_natural = softmax.score_to_log2 * kLn2;
    float gap = -INFINITY;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float t = tile_maximum[r];
      if (t == -INFINITY) continue;
      // A row's first scores, and NaN, have no finite gap.
      const float g =
          softmax.maximum[r] == -INFINITY ? INFINITY : (t - softmax.maximum[r]) * to_natural;
      gap = g <= gap ? gap : (g < INFINITY ? g : INFINITY);
    }
    float maximum = max_nan(leveled.of_row[0], leveled.of_row[1]);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      gap = fmaxf(gap, __shfl_xor_sync(kAllLanes, gap, lanes));
      maximum = max_nan(maximum, __shfl_xor_sync(kAllLanes, maximum, lanes));
    }
    if (at_.lane() != 0) return;
    s_.gap[visit.index % 2][at_.tile()][at_.strip()] = gap;
    s_.maximum[visit.index % 2][at_.tile()][at_.strip()] = maximum * to_natural;
  }

  __device__ __forceinline__ void decided(const Work& work, const Visit& visit, bool keep,
                                          TileMaxima leveled, const OnlineSoftmax& softmax) {
    report_tile(work, visit, keep, leveled, softmax);
    Counts::decided(work, visit, keep, leveled, softmax);
  }

  __device__ __forceinline__ void row(const Work& work, int r, int64_t cell, const RowEnd& end) {
    if (p_.report.dropped_mass_bound)
      p_.report.dropped_mass_bound[cell] = mass_[r].share(end.maximum, end.sum);
  }

 private:
  __device__ __forceinline__ float* maxima_of(const Work& work) const {
    return p_.report.tile_maxima + tile_row(work) * p_.report.tile_maxima_stride;
  }

  __device__ __forceinline__ void report_tile(const Work& work, const Visit& visit, bool keep,
                                              TileMaxima leveled, const OnlineSoftmax& softmax) {
    const int tile = visit.tile;
    if (!is_visible(work, tile)) return;
    if (at_.rank() == 0) {
      if (p_.report.gap_histogram) {
        const float(&strips)[4] = s_.gap[visit.index % 2][at_.tile()];
        const float gap = fmaxf(fmaxf(strips[0], strips[1]), fmaxf(strips[2], strips[3]));
        atomicAdd(p_.report.gap_histogram + work.head * BLASST_GAP_BINS + gap_bin(gap), 1ull);
      }
      if (p_.report.tile_maxima) {
        const float(&strips)[4] = s_.maximum[visit.index % 2][at_.tile()];
        maxima_of(work)[tile] =
            max_nan(max_nan(strips[0], strips[1]), max_nan(strips[2], strips[3]));
      }
    }
    if (keep) return;
    const QueryTile q = query_tile_of(work, at_.tile());
    float(&tile_maximum)[2] = leveled.of_row;
    quad_maxima(tile_maximum);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = q.position + at_.row(r);
      const Range seen = keys_seen(at, at, work.distances, work.keys);
      const int keys = min(seen.end, (tile + 1) * C::kKeys) - max(seen.begin, tile * C::kKeys);
      if (tile_maximum[r] == -INFINITY || keys <= 0) continue;
      mass_[r].add(tile_maximum[r] * softmax.score_to_log2, keys);
    }
  }

  typename C::Shared& s_;
  SkippedMass mass_[2];
};

template <typename C>
using Reports = std::conditional_t<C::kVariant == Variant::kReport, TileReports<C>,
                                   std::conditional_t<C::kTests, CountReports<C>, NoReports<C>>>;

}  // namespace blasst::cuda::prefill
