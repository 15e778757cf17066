// Prefill attention for compute capability 8.0 and later. docs/kernels/sm80.md draws the schedule.
//
// A block owns 128 or 64 query rows of one head at a time, query tiles that decide each on its own.
// All its threads copy what all of them read. The steps of one block's softmax are hidden under the
// products of the other block of the multiprocessor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cuda/core/fragment.cuh"
#include "cuda/core/online_softmax.cuh"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/output.cuh"
#include "cuda/core/prefill/reports.cuh"
#include "cuda/core/prefill/visit.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/sm80/core/ptx.cuh"
#include "cuda/sm80/prefill/config.cuh"
#include "cuda/sm80/prefill/copy.cuh"
#include "cuda/sm80/prefill/products.cuh"

namespace blasst::cuda::prefill::sm80 {

template <typename C>
class Block {
 public:
  __device__ Block(const Params& p, const Sources& sources, typename C::Shared& s)
      : Block(p, sources, s, ptx::warp_uniform(threadIdx.x / 32),
              std::make_integer_sequence<int, kReporting>()) {}

  __device__ void run() {
    const int items =
        p_.heads * (p_.first_block ? p_.first_block[p_.batch] : p_.batch * p_.row_blocks);
    int next = blockIdx.x;  // the first thread's
    for (;;) {
      if (threadIdx.x == 0) {
        Work work{};
        if (next < items) {
          work = describe<C>(
              p_, p_.first_block
                      ? item_of_list(next, p_.first_block, p_.batch, p_.heads, p_.section_heads)
                      : item_at(next, p_.batch, p_.heads, p_.row_blocks, p_.section_heads));
          s_.sources = sources_of(p_, sources_, work);
          next = gridDim.x + atomicAdd(p_.next_item, 1);
        }
        s_.work = work;
      }
      __syncthreads();
      if (s_.work.rows == 0) return;
      attend(s_.work);
      __syncthreads();
    }
  }

 private:
  static constexpr int kStrips = C::kStrips;
  // Strips that report something: counts and bits are a query tile's, which its first strip knows.
  static constexpr int kReporting = C::kVariant == Variant::kReport ? kStrips : 1;
  using Element = typename C::Element;
  using Place = typename C::Place;
  using Shared = typename C::Shared;
  using Scores = float[kStrips][C::kKeys / 2];
  using Probabilities = uint32_t[kStrips][C::kKeys / 4];
  using Outputs = float[kStrips][C::kValueDim / 2];
  using Maxima = float[kStrips][2];
  using Softmax = OnlineSoftmax[kStrips];

  // Over an item's tiles, with what copies them.
  struct Walk {
    const Work& work;
    const KeyCopies<C, typename C::Keys> keys;
    const KeyCopies<C, typename C::Values> values;
    const int tiles;
    Visit visit;
  };

  template <int... kWhich>
  __device__ Block(const Params& p, const Sources& sources, Shared& s, int warp,
                   std::integer_sequence<int, kWhich...>)
      : p_(p),
        sources_(sources),
        s_(s),
        // With a test registers are short: an address that the assembler knows how to work out it
        // works out before every use, one of a shuffle it keeps for the warp.
        base_(C::kTests ? ptx::warp_uniform(ptx::shared_address(&s)) : ptx::shared_address(&s)),
        warp_(warp),
        reports_{Reports<C>(p, s, Place{warp, kWhich})...} {}

  // --- an item ----------------------------------------------------------------------------------

  __device__ __forceinline__ void attend(const Work& work) {
    const Range tiles = {ptx::warp_uniform(work.tile_begin), ptx::warp_uniform(work.tile_end)};
    const Range plain = plain_tiles(work);
    Softmax softmax;
    Outputs o = {};
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      softmax[i] = OnlineSoftmax::empty(p_.score_to_log2);
      if (i < kReporting) reports_[i].begin(work);
    }
    if (tiles.begin < tiles.end) {
      copy_queries<C>(p_, sources_.q, work, base_ + offsetof(Shared, query));
      Walk walk{work,
                {p_, sources_.k, work.keys, s_.sources.keys, s_.sources.pages},
                {p_, sources_.v, work.keys, s_.sources.values, s_.sources.pages},
                tiles.end - tiles.begin,
                {}};
      walk.visit.begin(p_.order, tiles);
      if constexpr (C::kTests)
        attend_kept(walk, plain, softmax, o);
      else
        attend_all(walk, plain, softmax, o);
    }
    write(work, softmax, o);
  }

  // Without a test: the next tile's keys and values are copied under this one's products.
  __device__ __forceinline__ void attend_all(Walk& walk, Range plain, Softmax& softmax,
                                             Outputs& o) {
    const auto copy = [&](int index, int tile) {
      const bool wanted = index < walk.tiles;
      walk.keys.start(wanted, key_stage(index), tile);
      walk.values.start(wanted, value_stage(index), tile);
      ptx::commit_copies();
    };
    copy(0, walk.visit.tile);
    ptx::wait_copies<0>();
    __syncthreads();
    QueryFragments<C> first;
    load_queries<C>(first, queries(), 0);
#pragma unroll 1
    for (int index = 0; index < walk.tiles; ++index) {
      // 1. Keys and values are there, and nobody reads those of the last tile any more.
      ptx::wait_copies<0>();
      __syncthreads();
      const int tile = walk.visit.tile;
      walk.visit.next();
      copy(index + 1, walk.visit.tile);
      // 2. Scores, probabilities, outputs.
      Scores s;
      Maxima maxima;
      Probabilities p;
      take_scores(walk.work, plain, tile, first, key_stage(index), s, maxima);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        quad_maxima(maxima[i]);
        weigh(i, s, maxima, softmax, o, p);
      }
      multiply_values<C>(o, p, value_stage(index));
    }
  }

  // With a test. Keys are copied two tiles ahead. Values are asked for one tile ahead while tiles
  // are kept, since neighbours are often alike, else when their tile is.
  __device__ __forceinline__ void attend_kept(Walk& walk, Range plain, Softmax& softmax,
                                              Outputs& o) {
    Visit& visit = walk.visit;
    const auto copy_keys = [&](int index, int tile) {
      walk.keys.start(index < walk.tiles, key_stage(index), tile);
    };
    copy_keys(0, visit.tile);
    ptx::commit_copies();
    copy_keys(1, visit.next_tile);
    walk.values.start(true, value_stage(0), visit.tile);
    ptx::commit_copies();
    ptx::wait_copies<1>();
    __syncthreads();
    QueryFragments<C> first;
    load_queries<C>(first, queries(), 0);
    bool asked = true;  // for this tile's values, when the last one was at hand
#pragma unroll 1
    for (int index = 0; index < walk.tiles; ++index) {
      visit.masked = visit.tile < plain.begin || visit.tile >= plain.end;
      // 1. Scores, and what this warp says to them.
      Scores s;
      Maxima maxima;
      take_scores(walk.work, plain, visit.tile, first, key_stage(index), s, maxima);
      const bool wanted = votes_to_keep(walk.work, maxima, softmax);
      offer(visit, maxima, softmax);
      // 2. What the query tiles say. The next keys, and values that were asked for, are there for
      // everyone; nobody reads these keys any more, nor the last tile's values.
      ptx::wait_copies<0>();
      const int votes = count_votes(wanted);
      const int next_tile = visit.next_tile, keys_to_copy = next_tile + visit.step;
      // A tile that nobody wants: the short way.
      if (!__any_sync(kAllLanes, votes != 0)) {
        decided(walk.work, visit, false, maxima, softmax);
        copy_keys(index + 2, keys_to_copy);
        ptx::commit_copies();
        asked = false;
        visit.next();
        continue;
      }
      const unsigned use = tiles_of(votes);
      decided(walk.work, visit, is_own(use), maxima, softmax);
      if (is_own(use)) {  // shuffles, under the copies
#pragma unroll
        for (int i = 0; i < kStrips; ++i) quad_maxima(maxima[i]);
      }
      // 3. Its values, if they were not asked for; keys and values to come.
      walk.values.start(!asked, value_stage(index), visit.tile);
      ptx::commit_copies();
      copy_keys(index + 2, keys_to_copy);
      walk.values.start(index + 1 < walk.tiles, value_stage(index + 1), next_tile);
      ptx::commit_copies();
      // 4. Probabilities, outputs. Not every way from here to its use defines p: left undefined, it
      // would take its registers all around the loop.
      Probabilities p = {};
      if (is_own(use)) weigh(0, s, maxima, softmax, o, p);
      if (!asked) {
        ptx::wait_copies<1>();
        __syncthreads();
      }
      if (is_own(use)) {
#pragma unroll
        for (int i = 1; i < kStrips; ++i) weigh(i, s, maxima, softmax, o, p);
        multiply_values<C>(o, p, value_stage(index));
      }
      asked = true;
      visit.next();
    }
  }

  // --- scores -----------------------------------------------------------------------------------

  // Tiles whose scores are final as they come.
  __device__ __forceinline__ Range plain_tiles(const Work& work) const {
    if (p_.softcap > 0) return {0, 0};
    const Range plain = whole_tiles<C::kKeys>(work, query_tile_of(work, place(0).tile()));
    return {ptx::warp_uniform(plain.begin), ptx::warp_uniform(plain.end)};
  }

  // The scores of a tile, and the largest ones of the thread's own.
  __device__ __forceinline__ void take_scores(const Work& work, Range plain, int tile,
                                              const QueryFragments<C>& first, uint32_t stage,
                                              Scores& s, Maxima& maxima) const {
    multiply_scores<C>(s, first, queries(), stage);
    if (tile < plain.begin || tile >= plain.end) cap_and_mask(work, tile * C::kKeys, s);
#pragma unroll
    for (int i = 0; i < kStrips; ++i) row_maxima(s[i], maxima[i]);
  }

  __device__ __forceinline__ void cap_and_mask(const Work& work, int key, Scores& s) const {
    const QueryTile q = query_tile_of(work, place(0).tile());
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      if (p_.softcap > 0) {
#pragma unroll
        for (float& x : s[i]) x = tanh_exact(x * p_.softcap_scale);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = place(i).row(r), at = q.position + row;
        Range seen = keys_seen(at, at, work.distances, work.keys);
        if (row >= q.rows) seen.end = 0;
        mask_row(s[i], r, seen, key + place(i).column(), -INFINITY);
      }
    }
  }

  // --- decision ---------------------------------------------------------------------------------

  // Of this warp's query tile. Sets have bit t for the block's query tile t.
  __device__ __forceinline__ bool is_own(unsigned tiles) const {
    return tiles >> place(0).tile() & 1;
  }

  __device__ __forceinline__ bool votes_to_keep(const Work& work, const Maxima& maxima,
                                                const Softmax& softmax) const {
    const float threshold = work.threshold[place(0).tile()];
    bool skip = true;
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        skip &= maxima[i][r] < skip_below(p_.test.kind, threshold, softmax[i].maximum[r]);
    }
    return __any_sync(kAllLanes, !skip);
  }

  // Votes for the keys at hand; all warps meet here. The second query tile's warps count as one
  // thread each, those of the first as 32.
  __device__ __forceinline__ int count_votes(bool wanted) const {
    const bool counts = place(0).tile() == 0 || threadIdx.x % 32 == 0;
    return __syncthreads_count(wanted && counts);
  }

  // The query tiles of which some warp voted. Votes are the same in all lanes; another vote tells
  // the assembler so, sooner than a shuffle.
  static __device__ __forceinline__ unsigned tiles_of(int votes) {
    const bool first = __any_sync(kAllLanes, votes >= 32);
    const bool second = __any_sync(kAllLanes, votes % 32 != 0);
    return (first ? 1 : 0) | (second ? 2 : 0);
  }

  __device__ __forceinline__ void offer(const Visit& visit, const Maxima& maxima,
                                        const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < kReporting; ++i)
      reports_[i].offer(visit, maxima[i], {maxima[i][0], maxima[i][1]}, softmax[i]);
  }

  __device__ __forceinline__ void decided(const Work& work, const Visit& visit, bool keep,
                                          const Maxima& maxima, const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < kReporting; ++i)
      reports_[i].decided(work, visit, keep, {maxima[i][0], maxima[i][1]}, softmax[i]);
  }

  // --- probabilities and outputs ----------------------------------------------------------------

  // The scores of a strip become probabilities; its outputs so far follow the rows' maxima.
  __device__ __forceinline__ void weigh(int strip, const Scores& s, const Maxima& maxima,
                                        Softmax& softmax, Outputs& o, Probabilities& p) const {
    move_maxima(softmax[strip], maxima[strip], o[strip]);
    exponentials<Element>(softmax[strip], s[strip], p[strip]);
  }

  // Normalises and writes the rows.
  __device__ __forceinline__ void write(const Work& work, const Softmax& softmax,
                                        const Outputs& o) {
    const int tile = place(0).tile();
    const int rows = query_tile_of(work, tile).rows;
    const int output_row = work.output_row + tile * kQueryTileRows;
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const Place at = place(i);
      float weight[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(softmax[i].sum[r]);
        const bool empty = softmax[i].maximum[r] == -INFINITY && sum == 0;
        const RowEnd end = finish_row(softmax[i].log2_maximum(r), sum, empty,
                                      p_.sinks ? p_.sinks + work.head : nullptr, p_.report.lse);
        weight[r] = end.weight;
        if (at.lane() % 4 == 0 && at.row(r) < rows) {
          const int64_t cell = int64_t{work.head} * p_.rows + output_row + at.row(r);
          if (p_.report.lse) p_.report.lse[cell] = end.lse;
          if (i < kReporting) reports_[i].row(work, r, cell, end);
        }
      }
      if (i < kReporting) reports_[i].finish(work);
      write_rows<Element>(p_, work, at, output_row, rows, weight, o[i]);
    }
  }

  // --- places -----------------------------------------------------------------------------------

  __device__ __forceinline__ Place place(int strip) const { return {warp_, strip}; }
  __device__ __forceinline__ uint32_t queries() const {  // this warp's
    return base_ + offsetof(Shared, query) + warp_ * kStrips * 16 * C::Queries::kRowBytes;
  }
  __device__ __forceinline__ uint32_t key_stage(int index) const {
    return base_ + offsetof(Shared, key) + index % C::kStages * C::Keys::kBytes;
  }
  __device__ __forceinline__ uint32_t value_stage(int index) const {
    return base_ + offsetof(Shared, value) + index % C::kStages * C::Values::kBytes;
  }

  const Params& p_;
  const Sources& sources_;
  Shared& s_;
  const uint32_t base_;  // address of s_
  const int warp_;
  Reports<C> reports_[kReporting];
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 256 / C::kThreads)
    attend(const __grid_constant__ Params p, const __grid_constant__ Sources sources) {
  extern __shared__ __align__(128) uint8_t memory[];
  Block<C>(p, sources, *reinterpret_cast<typename C::Shared*>(memory)).run();
}

}  // namespace blasst::cuda::prefill::sm80
