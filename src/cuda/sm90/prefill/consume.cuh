// A consumer warpgroup: scores, decisions, softmax and outputs of its 64 query rows.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cuda/core/fragment.cuh"
#include "cuda/core/online_softmax.cuh"
#include "cuda/core/prefill/output.cuh"
#include "cuda/core/prefill/reports.cuh"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/prefill/visit.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/core/wgmma.cuh"
#include "cuda/sm90/prefill/config.cuh"
#include "cuda/sm90/prefill/exact_scores.cuh"
#include "cuda/sm90/prefill/int8_scores.cuh"
#include "cuda/sm90/prefill/store.cuh"

namespace blasst::cuda::prefill {

// What the loop over tiles needs is in registers: queries, a tile's scores and probabilities,
// outputs. The rest is read from `work` when needed. Nothing hides what stands between two
// products, so that is kept short: addresses come from one base, a tile from the last.
template <typename C>
class Consumer {
 public:
  __device__ Consumer(const Params& p, typename C::Shared& s)
      : p_(p), s_(s), base_(ptx::opaque(ptx::shared_address(&s))), reports_(p, s, at_) {}

  __device__ void run() {
    Ring<2> works;
    visit_.index = 0;
    for (;;) {
      ptx::mbarrier_wait(address(s_.barriers.work_full[works.stage]), works.phase);
      const Work& work = s_.work[works.stage];
      if (ptx::warp_uniform(work.rows) == 0) return;
      attend(work);
      arrive(address(s_.barriers.work_empty[works.stage]));
      works.next();
    }
  }

 private:
  using L = typename C::Layout;
  using Shared = typename C::Shared;
  using Element = typename C::Element;
  using ScoresOf = std::conditional_t<C::kInt8, Int8Scores<C>, ExactScores<C>>;
  using Tile = typename ScoresOf::Tile;
  using Probabilities = uint32_t[C::kKeys / 4];
  using Outputs = float[C::kValueDim / 2];
  using Softmax = std::conditional_t<C::kTests && !C::kInt8, OnlineSoftmax, OnlineSoftmaxApart>;
  // Where the product of scores is short, the exponentials of a tile are taken in place, under the
  // outputs of the tile before.
  static constexpr bool kUnderOutputs = C::kInt8;

  // The decision on a tile, and what it was taken from.
  struct Decision {
    bool keep;
    float maximum[2];  // of the tile, in the thread's rows; of a kept one in the quad's
  };

  // --- the loop ---------------------------------------------------------------------------------

  __device__ __forceinline__ void attend(const Work& work) {
    const Range tiles = {ptx::warp_uniform(work.tile_begin), ptx::warp_uniform(work.tile_end)};
    set_plain_tiles(work);
    visit_.begin(p_.order, tiles);
    reports_.begin(work);
    if constexpr (C::kTests) threshold_ = work.threshold[at_.warpgroup];
    Softmax softmax = Softmax::empty(p_.score_to_log2);
    Outputs o = {};
    if (const int count = tiles.end - tiles.begin; count > 0) {
      ptx::mbarrier_wait(address(s_.barriers.query_full), query_phase_);
      query_phase_ ^= 1;
      scores_.load_queries(p_, work, s_, at_);
      attend_tiles(work, count, softmax, o);
      ++visit_.index;
    }
    write(work, softmax, o);
  }

  // The tiles of an item. The scores of the next tile and the outputs of a kept one are computed
  // together; then come the next tile's decision and exponentials, under the products of the other
  // warpgroups.
  __device__ __forceinline__ void attend_tiles(const Work& work, int count, Softmax& softmax,
                                               Outputs& o) {
    Tile s;
    Probabilities p;
    Weights weights;
    Arrived arrived;
    wait_keys();
    start_scores(s);
    int left = count - 1;  // tiles behind the one at hand
    Decision tile = take_scores<0>(s, work, softmax, left != 0);
#pragma unroll 1
    for (;;) {
      // 1. Skipped tiles. The next scores start before the fate of the last is announced.
      if (!tile.keep) {
#pragma unroll 1
        do {
          if (left == 0) {
            announce(work, tile, softmax);
            return release_queries();
          }
          start_scores(s);
          announce(work, tile, softmax);
          visit_.next();
          tile = take_scores<0>(s, work, softmax, --left != 0);
        } while (!tile.keep);
      }
      announce(work, tile, softmax);
      quad_maxima(tile.maximum);
      if constexpr (kUnderOutputs) {
        weigh(s, tile, softmax, weights);
        arrived = ask();
        use(s, weights, p, softmax, o);
      }
#pragma unroll 1
      do {
        // 2. A kept tile's probabilities, under the products of the other warpgroups.
        if constexpr (!kUnderOutputs) {
          move_maxima(softmax, tile.maximum, o);
          exponentials<Element>(softmax, s, p);
        }
        if (left == 0) {
          release_queries();
          start_outputs(o, p, work, arrived.values);
          return finish_outputs(o, visit_.index);
        }
        // 3. The next scores and this tile's outputs, one behind the other.
        if (!C::kTests && !arrived.keys) wait_keys();
        start_scores(s);
        start_outputs(o, p, work, arrived.values);
        visit_.next();
        // 4. The decision on the next tile, under the outputs.
        tile = take_scores<1>(s, work, softmax, --left != 0);
        if (tile.keep) {
          announce(work, tile, softmax);
          quad_maxima(tile.maximum);
          if constexpr (kUnderOutputs) {
            weigh(s, tile, softmax, weights);
            order_before_wait(__int_as_float(s[0]));
          } else if constexpr (!C::kTests) {
            order_before_wait(tile.maximum[0] + tile.maximum[1]);
          }
        }
        // 5. The outputs, before the softmax may scale them.
        if constexpr (kUnderOutputs) arrived = ask();
        finish_outputs(o, visit_.index - 1);
        if constexpr (kUnderOutputs) {
          if (tile.keep) use(s, weights, p, softmax, o);
        }
      } while (tile.keep);
    }
  }

  // --- scores -----------------------------------------------------------------------------------

  // Whether the next keys and this tile's values are there, asked before they are needed: an answer
  // takes as long as thirty instructions.
  struct Arrived {
    bool keys = false, values = false;
  };
  __device__ __forceinline__ Arrived ask() const {
    Arrived a;
    if constexpr (!C::kTests)
      a.keys = ptx::mbarrier_test(key_barrier(offsetof(Shared, barriers.key_full), keys_.stage),
                                  keys_.phase);
    a.values = ptx::mbarrier_test(value_barrier(), value_phase());
    return a;
  }

  // The next key stage is filled. Where it comes in parts, each is waited for when it is used: keys
  // that are not given back meanwhile would keep others from being loaded.
  __device__ __forceinline__ void wait_keys() const {
    if constexpr (L::kKeyParts == 1)
      ptx::mbarrier_wait(key_barrier(offsetof(Shared, barriers.key_full), keys_.stage),
                         keys_.phase);
  }
  __device__ __forceinline__ uint32_t key_barrier(uint32_t first, int stage) const {
    return base_ + first + 8 * L::kKeyParts * stage;
  }

  // s = Q K^T of the next key stage.
  __device__ __forceinline__ void start_scores(Tile& s) {
#pragma unroll
    for (int part = 0; part < L::kKeyParts; ++part) {
      if constexpr (L::kKeyParts > 1)
        ptx::mbarrier_wait(key_barrier(offsetof(Shared, barriers.key_full), keys_.stage) + 8 * part,
                           keys_.phase);
      ptx::wgmma_fence();
      scores_.start(s, base_, at_.warpgroup, keys_.stage, part);
      ptx::wgmma_commit();
    }
    scores_.read_stage(s_, keys_.stage);
    keys_.next();
  }

  // Scores that are on their way, older than the kPending newest products, arrive and are decided
  // on. What does not need them comes before, under their product: the bounds of the test and, with
  // `more` to come, the wait for the keys after them.
  template <int kPending>
  __device__ __forceinline__ Decision take_scores(Tile& s, const Work& work, const Softmax& softmax,
                                                  bool more) {
    visit_.masked =
        static_cast<unsigned>(visit_.tile - plain_begin_) >= static_cast<unsigned>(plain_count_) ||
        scores_.any_broken();
    float below[2];
    if constexpr (C::kTests) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        below[r] = skip_below(p_.test.kind, threshold_of_row(r), softmax.maximum[r]);
      ptx::fence_registers(below);
      if (more) wait_keys();
    }
    // Their keys may be overwritten, part by part.
    const uint32_t empty = key_barrier(offsetof(Shared, barriers.key_empty), scored_.stage);
    if constexpr (L::kKeyParts == 3) {
      ptx::wgmma_wait<kPending + 2>();
      arrive(empty);
      ptx::wgmma_wait<kPending + 1>();
      arrive(empty + 8);
    }
    ptx::wgmma_wait<kPending>();
    ptx::fence_registers(s);
    arrive(empty + 8 * (L::kKeyParts - 1));
    scored_.next();
    Decision tile;
    if (visit_.masked) [[unlikely]] {
      cap_and_mask(s, work);
      scores_.capped_maxima(s, tile.maximum);
    } else {
      scores_.maxima(s, tile.maximum);
    }
    tile.keep = decide(tile.maximum, below, softmax);
    return tile;
  }

  // Tiles whose scores are final as they come.
  __device__ __forceinline__ void set_plain_tiles(const Work& work) {
    const Range whole = work.whole[at_.warpgroup];
    plain_begin_ = ptx::warp_uniform(whole.begin);
    plain_count_ = ptx::warp_uniform(p_.softcap > 0 ? 0 : whole.end - whole.begin);
  }

  __device__ __forceinline__ void cap_and_mask(Tile& s, const Work& work) const {
    scores_.cap(s, p_, work, visit_.tile, at_);
    const QueryTile q = query_tile_of(work, at_.warpgroup);
    const Range whole = work.whole[at_.warpgroup];
    if (visit_.tile >= whole.begin && visit_.tile < whole.end) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = q.position + at_.row(r);
      Range seen = keys_seen(at, at, work.distances, work.keys);
      if (at_.row(r) >= q.rows) seen.end = 0;
      mask_row(s, r, seen, visit_.tile * C::kKeys + at_.column(), ScoresOf::kMasked);
    }
  }

  // Maxima as the caller means them: with the level that scores in int8 leave out.
  __device__ __forceinline__ TileMaxima leveled(const float (&maximum)[2]) const {
    TileMaxima all;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      all.of_row[r] = maximum[r];
      // What a row that does not exist has for a level may be NaN.
      if constexpr (C::kInt8)
        if (maximum[r] != -INFINITY) all.of_row[r] += scores_.level(p_, r);
    }
    return all;
  }
  __device__ __forceinline__ float threshold_of_row(int r) const {
    if constexpr (C::kInt8)
      if (p_.test.kind == BLASST_TEST_ABSOLUTE) return threshold_ - scores_.level(p_, r);
    return threshold_;
  }

  // --- decision ---------------------------------------------------------------------------------

  // Whether the tile is kept: unless all rows of the warpgroup are `below`.
  __device__ __forceinline__ bool decide(const float (&maximum)[2], const float (&below)[2],
                                         const Softmax& softmax) {
    if constexpr (!C::kTests) {
      return true;
    } else {
      reports_.offer(visit_, maximum, leveled(maximum), softmax);
      const bool skip = maximum[0] < below[0] && maximum[1] < below[1];
      return __any_sync(kAllLanes, !ptx::named_barrier_all(1 + at_.warpgroup, 128, skip));
    }
  }

  // Tells the producers what was decided.
  __device__ __forceinline__ void announce(const Work& work, Decision& tile,
                                           const Softmax& softmax) {
    if constexpr (C::kTests) {
      const uint32_t decision = base_ + offsetof(Shared, decision) +
                                visit_.index % L::kValueStages * sizeof(*s_.decision);
      ptx::post_shared_if(decision + 4 * at_.warpgroup, 2 * visit_.index + tile.keep,
                          threadIdx.x % 128 == 0);
      reports_.decided(work, visit_, tile.keep, leveled(tile.maximum), softmax);
      if (!tile.keep) release_values(visit_.index);
    }
  }

  // --- probabilities in place -------------------------------------------------------------------

  // What the outputs so far are to be scaled with, if at all.
  struct Weights {
    float alpha[2];
    bool moved;
  };

  // The scores of a kept tile become probabilities, but for the last quarter.
  __device__ __forceinline__ void weigh(Tile& s, const Decision& tile, Softmax& softmax,
                                        Weights& weights) {
    weights.moved = softmax.raise(tile.maximum, weights.alpha);
    scores_.exponentials(s, visit_.masked, weights.alpha, softmax);
  }

  // The last quarter; all go where the next scores do not overwrite them, packed in what
  // exponentials leave of issue slots. The outputs follow the maxima.
  __device__ __forceinline__ void use(Tile& s, const Weights& weights, Probabilities& p,
                                      Softmax& softmax, Outputs& o) {
    scores_.last_exponentials(s, softmax);
#pragma unroll
    for (int j = 0; j < C::kKeys / 4; ++j)
      p[j] = pack2<Element>(__int_as_float(s[2 * j]), __int_as_float(s[2 * j + 1]));
    if (weights.moved) scale_rows(o, weights.alpha);
  }

  // --- outputs ----------------------------------------------------------------------------------

  // o += P V of the tile at hand.
  __device__ __forceinline__ void start_outputs(Outputs& o, const Probabilities& p,
                                                const Work& work, bool values_there) {
    if (!values_there) ptx::mbarrier_wait(value_barrier(), value_phase());
    if (visit_.masked) [[unlikely]]
      clear_values(
          base_ + offsetof(Shared, value) + visit_.index % L::kValueStages * L::Values::kBytes,
          work.keys - visit_.tile * C::kKeys);
    const uint64_t v =
        ptx::advance(ptx::wgmma_descriptor(base_ + offsetof(Shared, value), L::Values::kPanelBytes),
                     visit_.index % L::kValueStages * L::Values::kBytes);
    ptx::fence_registers(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step) {
      ptx::Wgmma<Element, C::kValueDim>::add_registers_by_columns(
          o, p + 4 * step, ptx::advance(v, 16 * step * kPanelRowBytes));
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ uint32_t value_barrier() const {
    return base_ + offsetof(Shared, barriers.value_full) + 8 * (visit_.index % L::kValueBarriers);
  }
  __device__ __forceinline__ uint32_t value_phase() const {
    return visit_.index / L::kValueBarriers & 1;
  }

  // What lies behind the last key may be anything, NaN too, and 0 * NaN is not 0.
  __device__ __forceinline__ void clear_values(uint32_t stage, int valid) {
    if (valid >= C::kKeys) return;
    const int vectors = (C::kKeys - valid) * (kPanelRowBytes / 16);
#pragma unroll 1
    for (int panel = 0; panel < L::Values::kCount; ++panel) {
      const uint32_t first = stage + panel * L::Values::kPanelBytes + valid * kPanelRowBytes;
#pragma unroll 1
      for (int i = threadIdx.x % 128; i < vectors; i += 128)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(first + 16 * i), "r"(0));
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + at_.warpgroup, 128);
  }

  // The outputs are there, those of `visit` the newest.
  __device__ __forceinline__ void finish_outputs(Outputs& o, int visit) {
    ptx::wgmma_wait<0>();
    ptx::fence_registers(o);
    release_values(visit);
  }

  // Normalises and writes the rows.
  __device__ __forceinline__ void write(const Work& work, const Softmax& softmax,
                                        const Outputs& o) {
    const QueryTile q = query_tile_of(work, at_.warpgroup);
    const int output_row = work.output_row + at_.warpgroup * kQueryTileRows;
    const float* sink = p_.sinks ? p_.sinks + work.head : nullptr;
    const float sum[2] = {quad_sum(softmax.sum[0]), quad_sum(softmax.sum[1])};
    float weight[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool empty = softmax.maximum[r] == -INFINITY && sum[r] == 0;
      float log2_maximum = softmax.log2_maximum(r);
      if constexpr (C::kInt8) log2_maximum += scores_.level(p_, r);
      const RowEnd end = finish_row(log2_maximum, sum[r], empty, sink, p_.report.lse);
      weight[r] = end.weight;
      if (at_.lane() % 4 == 0 && at_.row(r) < q.rows) {
        const int64_t cell = int64_t{work.head} * p_.rows + output_row + at_.row(r);
        if (p_.report.lse) p_.report.lse[cell] = end.lse;
        reports_.row(work, r, cell, end);
      }
    }
    reports_.finish(work);
    if (is_staged<C>(q)) return stage(weight, o);
    write_rows<Element>(p_, work, at_, output_row, q.rows, weight, o);
  }

  // Leaves them in shared memory, for store_outputs.
  __device__ __forceinline__ void stage(const float (&weight)[2], const Outputs& o) {
    ptx::mbarrier_wait(address(s_.barriers.output_empty[at_.warpgroup]), output_phase_ ^ 1);
    output_phase_ ^= 1;
    // Of each 16 columns a lane has the address of a row of one of four 8 x 8 blocks.
    const uint32_t panels = ptx::shared_address(s_.output[at_.warpgroup]);
    const int row = at_.strip() * 16 + at_.lane() % 16, half = at_.lane() / 16;
#pragma unroll
    for (int j = 0; j < C::kValueDim / 16; ++j) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &o[8 * j + 2 * i];
        x[i] = pack2<Element>(pair[0] * weight[i % 2], pair[1] * weight[i % 2]);
      }
      ptx::store_matrices(panels + place_of_vector<typename L::Outputs>(row, 2 * j + half), x);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    arrive(address(s_.barriers.output_full[at_.warpgroup]));
  }

  // --- shared memory ----------------------------------------------------------------------------

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    ptx::mbarrier_arrive_if(barrier, at_.lane() == 0);
  }

  // The queries in shared memory may be overwritten.
  __device__ __forceinline__ void release_queries() {
    if constexpr (!ScoresOf::kQueriesInRegisters) arrive(address(s_.barriers.query_empty));
  }

  // This warp no longer needs the values of a visit.
  __device__ __forceinline__ void release_values(int visit) {
    arrive(base_ + offsetof(Shared, barriers.value_done) + 8 * (visit % L::kValueBarriers));
  }

  // Never stores. It keeps the assembler from moving a wait that follows to before `x` is there.
  // (With a tile test, the vote does.)
  __device__ __forceinline__ void order_before_wait(float x) const {
    ptx::store_shared_if(base_, __float_as_int(x), p_.order < 0);
  }

  const Params& p_;
  Shared& s_;
  const uint32_t base_;  // address of s_
  const ThreadPlace at_;
  ScoresOf scores_;
  Reports<C> reports_;
  Visit visit_;
  int plain_begin_, plain_count_;  // tiles whose scores are final as they come
  float threshold_;                // as a difference of raw scores
  Ring<L::kKeyStages> keys_;       // the next to score
  Ring<L::kKeyStages> scored_;     // the next to give back
  uint32_t query_phase_ = 0, output_phase_ = 0;
};

}  // namespace blasst::cuda::prefill
