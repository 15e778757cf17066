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
              std::make_integer_sequence<int, C::kStrips>()) {}

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
  using Element = typename C::Element;
  using Place = typename C::Place;
  using Shared = typename C::Shared;
  using Scores = float[kStrips][C::kStepKeys / 2];
  using Probabilities = uint32_t[kStrips][C::kStepKeys / 4];
  using Outputs = float[kStrips][C::kValueDim / 2];
  using Maxima = float[kStrips][2];
  using Softmax = OnlineSoftmax[kStrips];
  using Keys = KeyCopies<C, typename C::Keys>;
  using Values = KeyCopies<C, typename C::Values>;

  template <int... kWhich>
  __device__ Block(const Params& p, const Sources& sources, Shared& s, int warp,
                   std::integer_sequence<int, kWhich...>)
      : p_(p),
        sources_(sources),
        s_(s),
        base_(ptx::shared_address(&s)),
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
      reports_[i].begin(work);
    }
    if (tiles.begin < tiles.end) {
      copy_queries<C>(p_, sources_.q, work, base_ + offsetof(Shared, query));
      if constexpr (C::kTests)
        attend_kept(work, tiles, plain, softmax, o);
      else
        attend_all(work, tiles, plain, softmax, o);
    }
    write(work, softmax, o);
  }

  // Without a test: the next step's keys and values are copied under this one's products.
  __device__ __forceinline__ void attend_all(const Work& work, Range tiles, Range plain,
                                             Softmax& softmax, Outputs& o) {
    const Keys keys(p_, sources_.k, work);
    const Values values(p_, sources_.v, work);
    const int steps = (tiles.end - tiles.begin) * C::kSteps;
    Visit visit{};
    visit.begin(p_.order, tiles);
    const auto copy = [&](int index, int key) {
      keys.start(key_stage(index), key);
      values.start(value_stage(index), key);
      ptx::commit_copies();
    };
    copy(0, visit.tile * C::kKeys);
#pragma unroll 1
    for (int index = 0; index < steps; ++index) {
      const bool last = index % C::kSteps == C::kSteps - 1;
      const int key = visit.tile * C::kKeys + index % C::kSteps * C::kStepKeys;
      // 1. Keys and values are there, and nobody reads those of the last step any more.
      ptx::wait_copies<0>();
      __syncthreads();
      if (last) visit.next();
      if (index + 1 < steps) copy(index + 1, last ? visit.tile * C::kKeys : key + C::kStepKeys);
      // 2. Scores, probabilities, outputs.
      Scores s;
      Maxima maxima;
      Probabilities p;
      take_scores(work, plain, key, key_stage(index), s, maxima);
      weigh(s, maxima, softmax, o, p);
      multiply_values<C>(o, p, value_stage(index));
    }
  }

  // With a test. A query tile decides on all keys of a tile, but where that takes two steps it has
  // the scores of one at a time: if the first step's scores do for keeping, it goes on with them at
  // once; if only the second's do, those of the first are computed again after it.
  __device__ __forceinline__ void attend_kept(const Work& work, Range tiles, Range plain,
                                              Softmax& softmax, Outputs& o) {
    const Keys keys(p_, sources_.k, work);
    const Values values(p_, sources_.v, work);
    const int steps = (tiles.end - tiles.begin) * C::kSteps;
    Visit visit{};
    visit.begin(p_.order, tiles);
    TileSoFar so_far;
    unsigned kept_before = 0;  // bit t: query tile t keeps this tile for its first step
    unsigned missing = 0;      // the same: it lacks the first step, which comes once more
    const auto copy_keys = [&](int index, int key) {
      if (index < steps) keys.start(key_stage(index), key);
      ptx::commit_copies();
    };
    copy_keys(0, visit.tile * C::kKeys);
    copy_keys(1,
              C::kSteps == 2 ? visit.tile * C::kKeys + C::kStepKeys : visit.next_tile * C::kKeys);
    ptx::wait_copies<1>();
    __syncthreads();
#pragma unroll 1
    for (int index = 0; index < steps;) {
      const bool again = missing != 0;
      const int step = again ? index - 1 : index, half = step % C::kSteps;
      const bool last = half == C::kSteps - 1;
      const int key = visit.tile * C::kKeys + half * C::kStepKeys;
      visit.masked = visit.tile < plain.begin || visit.tile >= plain.end;
      // 1. Scores, and what this warp says to them.
      Scores s;
      Maxima maxima;
      bool wanted = is_own(missing);
      if (!again || wanted) take_scores(work, plain, key, key_stage(step), s, maxima);
      if (!again) {
        wanted = is_own(kept_before) || votes_to_keep(work, maxima, softmax);
        so_far.add(half == 0, maxima, softmax);
        if (last) offer(visit, so_far);
      }
      // 2. What the query tiles say; the next step's keys are there for everyone, and nobody reads
      // this one's any more, nor the last values.
      ptx::wait_copies<0>();
      const unsigned use = wanted_by_tiles(wanted);
      const unsigned late = again || half == 0 ? 0 : use & ~kept_before;
      if (!again && last) decided(work, visit, is_own(use), so_far, softmax);
      // 3. Values that somebody wants; keys of the step after next, in the stage of the last one's.
      if (use) {
        values.start(value_stage(0), key);
        ptx::commit_copies();
      }
      if (!late) {
        const int tile = C::kSteps == 2 ? visit.next_tile : visit.next_tile + visit.step;
        copy_keys(index + 2, tile * C::kKeys + index % C::kSteps * C::kStepKeys);
      }
      // 4. Probabilities, under the copy; outputs.
      if (use) {
        Probabilities p;
        if (is_own(use)) weigh(s, maxima, softmax, o, p);
        late ? ptx::wait_copies<0>() : ptx::wait_copies<1>();
        __syncthreads();
        if (is_own(use)) multiply_values<C>(o, p, value_stage(0));
      }
      // 5. The next step, or the first one once more.
      missing = late;
      if (late) continue;
      kept_before = again || last ? 0 : use;
      if (index % C::kSteps == C::kSteps - 1) visit.next();
      ++index;
    }
  }

  // --- scores -----------------------------------------------------------------------------------

  // Tiles whose scores are final as they come.
  __device__ __forceinline__ Range plain_tiles(const Work& work) const {
    if (p_.softcap > 0) return {0, 0};
    const Range plain = whole_tiles<C::kKeys>(work, query_tile_of(work, place(0).tile()));
    return {ptx::warp_uniform(plain.begin), ptx::warp_uniform(plain.end)};
  }

  // The scores of a step, and the largest ones of the thread's own.
  __device__ __forceinline__ void take_scores(const Work& work, Range plain, int key,
                                              uint32_t stage, Scores& s, Maxima& maxima) const {
    const uint32_t query =
        base_ + offsetof(Shared, query) + warp_ * kStrips * 16 * C::Queries::kRowBytes;
    multiply_scores<C>(s, query, stage);
    const int tile = key / C::kKeys;
    if (tile < plain.begin || tile >= plain.end) cap_and_mask(work, key, s);
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
        skip = skip && maxima[i][r] < skip_below(p_.test.kind, threshold, softmax[i].maximum[r]);
    }
    return __any_sync(kAllLanes, !skip);
  }

  // The query tiles of which some warp wants the keys at hand; all warps meet here. The second
  // tile's warps count as one thread each, those of the first as 32.
  __device__ __forceinline__ unsigned wanted_by_tiles(bool wanted) const {
    const bool counts = place(0).tile() == 0 || threadIdx.x % 32 == 0;
    const int count = ptx::warp_uniform(__syncthreads_count(wanted && counts));
    return (count >= 32 ? 1 : 0) | (count % 32 != 0 ? 2 : 0);
  }

  // What the test compares, of a tile whose scores come in steps: reports need it whole.
  struct TileSoFar {
    Maxima maxima;   // of the tile
    Softmax before;  // of the tiles before

    __device__ __forceinline__ void add(bool first, const Maxima& more, const Softmax& softmax) {
      if constexpr (C::kVariant == Variant::kReport) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          if (first) before[i] = softmax[i];
#pragma unroll
          for (int r = 0; r < 2; ++r)
            maxima[i][r] = first ? more[i][r] : max_nan(maxima[i][r], more[i][r]);
        }
      }
    }
  };

  __device__ __forceinline__ void offer(const Visit& visit, const TileSoFar& tile) {
    if constexpr (C::kVariant == Variant::kReport) {
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        reports_[i].offer(visit, tile.maxima[i], {tile.maxima[i][0], tile.maxima[i][1]},
                          tile.before[i]);
      }
    }
  }

  __device__ __forceinline__ void decided(const Work& work, const Visit& visit, bool keep,
                                          const TileSoFar& tile, const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      TileMaxima maxima = {};
      if constexpr (C::kVariant == Variant::kReport)
        maxima = {tile.maxima[i][0], tile.maxima[i][1]};
      reports_[i].decided(work, visit, keep, maxima, softmax[i]);
    }
  }

  // --- probabilities and outputs ----------------------------------------------------------------

  // The scores of a step that is kept become probabilities; the outputs so far follow the maxima.
  __device__ __forceinline__ void weigh(const Scores& s, Maxima& maxima, Softmax& softmax,
                                        Outputs& o, Probabilities& p) const {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      quad_maxima(maxima[i]);
      softmax[i].move(maxima[i], o[i]);
      softmax[i].template exponentials<Element>(s[i], p[i]);
    }
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
                                      p_.sinks ? p_.sinks + work.head : nullptr);
        weight[r] = end.weight;
        if (at.lane() % 4 == 0 && at.row(r) < rows) {
          const int64_t cell = int64_t{work.head} * p_.rows + output_row + at.row(r);
          if (p_.report.lse) p_.report.lse[cell] = end.lse;
          reports_[i].row(work, r, cell, end);
        }
      }
      reports_[i].finish(work);
      write_rows<Element>(p_, work, at, output_row, rows, weight, o[i]);
    }
  }

  // --- places -----------------------------------------------------------------------------------

  __device__ __forceinline__ Place place(int strip) const { return {warp_, strip}; }
  __device__ __forceinline__ uint32_t key_stage(int step) const {
    return base_ + offsetof(Shared, key) + step % C::kKeyStages * C::Keys::kBytes;
  }
  __device__ __forceinline__ uint32_t value_stage(int step) const {
    return base_ + offsetof(Shared, value) + step % C::kValueStages * C::Values::kBytes;
  }

  const Params& p_;
  const Sources& sources_;
  Shared& s_;
  const uint32_t base_;  // address of s_
  const int warp_;
  Reports<C> reports_[kStrips];
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 256 / C::kThreads)
    attend(const __grid_constant__ Params p, const __grid_constant__ Sources sources) {
  extern __shared__ __align__(128) uint8_t memory[];
  Block<C>(p, sources, *reinterpret_cast<typename C::Shared*>(memory)).run();
}

}  // namespace blasst::cuda::prefill::sm80
