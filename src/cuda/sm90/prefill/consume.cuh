// A consumer warpgroup: scores, decisions, softmax and outputs of its 64 query rows.
#pragma once

#include <cstddef>

#include "cuda/core/fragment.cuh"
#include "cuda/core/online_softmax.cuh"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/core/wgmma.cuh"
#include "cuda/sm90/prefill/config.cuh"
#include "cuda/sm90/prefill/reports.cuh"
#include "cuda/sm90/prefill/visit.cuh"

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
  static constexpr int kScores = C::kKeys / 2;  // a thread's share of a tile's scores
  static constexpr int kOutputs = C::kValueDim / 2;
  static constexpr int kQuerySteps = C::kQkDim / 16;
  // Three warpgroups, or wider outputs, leave no room for them.
  static constexpr bool kQueriesInRegisters = C::kQkDim == 128;

  using Scores = float[kScores];
  using Probabilities = uint32_t[kScores / 2];
  using Outputs = float[kOutputs];
  using Queries = uint32_t[kQueriesInRegisters ? kQuerySteps : 1][4];

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
    OnlineSoftmax softmax = OnlineSoftmax::empty(p_.score_to_log2);
    Outputs o = {};
    if (const int count = tiles.end - tiles.begin; count > 0) {
      ptx::mbarrier_wait(address(s_.barriers.query_full), query_phase_);
      query_phase_ ^= 1;
      Queries queries;
      if constexpr (kQueriesInRegisters) load_queries(queries);
      attend_tiles(work, count, queries, softmax, o);
      ++visit_.index;
    }
    write(work, softmax, o);
  }

  // The tiles of an item. The scores of the next tile and the outputs of a kept one are computed
  // together; then come the next tile's decision and exponentials, under the products of the other
  // warpgroups.
  __device__ __forceinline__ void attend_tiles(const Work& work, int count, const Queries& queries,
                                               OnlineSoftmax& softmax, Outputs& o) {
    Scores s;
    Probabilities p;
    wait_keys();
    start_scores(s, queries);
    Decision tile = take_scores<0>(s, work, softmax, count > 1);
#pragma unroll 1
    for (;;) {
      // 1. Skipped tiles. The next scores start before the fate of the last is announced.
      if (!tile.keep) {
#pragma unroll 1
        do {
          if (--count == 0) {
            announce(work, tile, softmax);
            return release_queries();
          }
          start_scores(s, queries);
          announce(work, tile, softmax);
          visit_.next();
          tile = take_scores<0>(s, work, softmax, count > 1);
        } while (!tile.keep);
      }
      announce(work, tile, softmax);
      quad_maxima(tile.maximum);
#pragma unroll 1
      do {
        // 2. A kept tile's probabilities, under the products of the other warpgroups.
        softmax.move(tile.maximum, o);
        softmax.template exponentials<Element>(s, p);
        if (--count == 0) {
          release_queries();
          start_outputs(o, p, work);
          return finish_outputs(o, visit_.index);
        }
        // 3. The next scores and this tile's outputs, one behind the other.
        if constexpr (!C::kTests) wait_keys();
        start_scores(s, queries);
        start_outputs(o, p, work);
        visit_.next();
        // 4. The decision on the next tile, under the outputs.
        tile = take_scores<1>(s, work, softmax, count > 1);
        if (tile.keep) {
          announce(work, tile, softmax);
          quad_maxima(tile.maximum);
          if constexpr (!C::kTests) order_before_wait(tile.maximum[0] + tile.maximum[1]);
        }
        // 5. The outputs, before the softmax may scale them.
        finish_outputs(o, visit_.index - 1);
      } while (tile.keep);
    }
  }

  // --- scores -----------------------------------------------------------------------------------

  // The next key stage is filled.
  __device__ __forceinline__ void wait_keys() const {
    ptx::mbarrier_wait(base_ + offsetof(Shared, barriers.key_full) + 8 * keys_.stage, keys_.phase);
  }

  // s = Q K^T of the next key stage.
  __device__ __forceinline__ void start_scores(Scores& s, const Queries& queries) {
    const uint64_t q = ptx::advance(ptx::wgmma_descriptor(base_ + offsetof(Shared, query)),
                                    at_.warpgroup * L::Queries::kBytes);
    const uint64_t k = ptx::advance(ptx::wgmma_descriptor(base_ + offsetof(Shared, key)),
                                    keys_.stage * L::Keys::kBytes);
    using Product = ptx::Wgmma<Element, C::kKeys>;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kQuerySteps; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      const uint64_t a = ptx::advance(q, panel * L::Queries::kPanelBytes + within);
      const uint64_t b = ptx::advance(k, panel * L::Keys::kPanelBytes + within);
      if constexpr (kQueriesInRegisters)
        step == 0 ? Product::first_registers(s, queries[step], b)
                  : Product::add_registers(s, queries[step], b);
      else
        step == 0 ? Product::first(s, a, b) : Product::add(s, a, b);
    }
    ptx::wgmma_commit();
    keys_.next();
  }

  // Scores that are on their way, older than the kPending newest products, arrive and are decided
  // on. With a test and `more` to come, the keys after them are waited for while there is nothing
  // else to do.
  template <int kPending>
  __device__ __forceinline__ Decision take_scores(Scores& s, const Work& work,
                                                  const OnlineSoftmax& softmax, bool more) {
    if (C::kTests && more) wait_keys();
    ptx::wgmma_wait<kPending>();
    ptx::fence_registers(s);
    // Their keys may be overwritten.
    arrive(base_ + offsetof(Shared, barriers.key_empty) + 8 * scored_.stage);
    scored_.next();
    visit_.masked =
        static_cast<unsigned>(visit_.tile - plain_begin_) >= static_cast<unsigned>(plain_count_);
    if (visit_.masked) [[unlikely]]
      cap_and_mask(s, work);
    return decide(s, softmax);
  }

  // Tiles whose scores are final as they come.
  __device__ __forceinline__ void set_plain_tiles(const Work& work) {
    const Range whole = whole_tiles<C::kKeys>(work, query_tile_of(work, at_.warpgroup));
    plain_begin_ = ptx::warp_uniform(whole.begin);
    plain_count_ = ptx::warp_uniform(p_.softcap > 0 ? 0 : whole.end - whole.begin);
  }

  __device__ __forceinline__ void cap_and_mask(Scores& s, const Work& work) const {
    if (p_.softcap > 0) {
#pragma unroll
      for (int j = 0; j < kScores; ++j) s[j] = tanh_exact(s[j] * p_.softcap_scale);
    }
    const QueryTile q = query_tile_of(work, at_.warpgroup);
    const Range whole = whole_tiles<C::kKeys>(work, q);
    if (visit_.tile >= whole.begin && visit_.tile < whole.end) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = q.position + at_.row(r);
      Range seen = keys_seen(at, at, work.distances, work.keys);
      if (at_.row(r) >= q.rows) seen.end = 0;
      mask_row(s, r, seen, visit_.tile * C::kKeys + at_.column());
    }
  }

  // --- decision ---------------------------------------------------------------------------------

  __device__ __forceinline__ Decision decide(const Scores& s, const OnlineSoftmax& softmax) {
    Decision tile;
    row_maxima(s, tile.maximum);
    if constexpr (!C::kTests) {
      tile.keep = true;
    } else {
      bool skip = true;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        skip = skip && tile.maximum[r] < skip_below(p_.test.kind, threshold_, softmax.maximum[r]);
      reports_.offer(visit_, tile.maximum, softmax);
      tile.keep = __any_sync(kAllLanes, !ptx::named_barrier_all(1 + at_.warpgroup, 128, skip));
    }
    return tile;
  }

  // Tells the producers what was decided.
  __device__ __forceinline__ void announce(const Work& work, Decision& tile,
                                           const OnlineSoftmax& softmax) {
    if constexpr (C::kTests) {
      const uint32_t decision = base_ + offsetof(Shared, decision) +
                                visit_.index % L::kValueStages * sizeof(*s_.decision);
      ptx::raise_shared_if(decision + 4 * at_.warpgroup, 2 * visit_.index + tile.keep,
                           threadIdx.x % 128 == 0);
      reports_.decided(work, visit_, tile.keep, tile.maximum, softmax);
      if (!tile.keep) release_values(visit_.index);
    }
  }

  // --- outputs ----------------------------------------------------------------------------------

  // o += P V of the tile at hand.
  __device__ __forceinline__ void start_outputs(Outputs& o, const Probabilities& p,
                                                const Work& work) {
    wait_values(work);
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

  __device__ __forceinline__ void wait_values(const Work& work) {
    ptx::mbarrier_wait(
        base_ + offsetof(Shared, barriers.value_full) + 8 * (visit_.index % L::kValueBarriers),
        visit_.index / L::kValueBarriers & 1);
    if (visit_.masked) [[unlikely]]
      clear_values(
          base_ + offsetof(Shared, value) + visit_.index % L::kValueStages * L::Values::kBytes,
          work.keys - visit_.tile * C::kKeys);
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
  __device__ __forceinline__ void write(const Work& work, const OnlineSoftmax& softmax,
                                        const Outputs& o) {
    const int rows = query_tile_of(work, at_.warpgroup).rows;
    const int output_row = work.output_row + at_.warpgroup * kQueryTileRows;
    float weight[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax.sum[r]);
      const bool empty = softmax.maximum[r] == -INFINITY && sum == 0;
      const RowEnd end = finish_row(softmax.log2_maximum(r), sum, empty,
                                    p_.sinks ? p_.sinks + work.head : nullptr);
      weight[r] = end.weight;
      if (at_.lane() % 4 == 0 && at_.row(r) < rows) {
        const int64_t cell = int64_t{work.head} * p_.rows + output_row + at_.row(r);
        if (p_.report.lse) p_.report.lse[cell] = end.lse;
        reports_.row(work, r, cell, end);
      }
    }
    reports_.finish(work);
    auto* out = static_cast<Element*>(p_.out.data) + work.head * p_.out.stride_head +
                row_in_tensor(p_, work.request, output_row) * p_.out.stride_token;
    if (!p_.cu_seqlens_q) out += work.request * p_.out.stride_request;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at_.row(r);
      Element* to = out + row * p_.out.stride_token + 8 * (at_.lane() % 4);
      // The four threads of a row trade pairs, so that each has eight elements side by side.
#pragma unroll
      for (int j = 0; j < C::kValueDim / 32; ++j) {
        uint32_t x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &o[16 * j + 4 * e + 2 * r];
          x[e] = pack2<Element>(pair[0] * weight[r], pair[1] * weight[r]);
        }
        transpose_in_quad(x);
        if (row < rows) *reinterpret_cast<uint4*>(to + 32 * j) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }

  // --- shared memory ----------------------------------------------------------------------------

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    ptx::mbarrier_arrive_if(barrier, at_.lane() == 0);
  }

  // This warpgroup's queries, from shared memory, as the first operand of wgmma: for each 16
  // elements of d, 16 x 16 in four 8 x 8 matrices a warp.
  __device__ __forceinline__ void load_queries(Queries& queries) {
    const int lane = at_.lane(), row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const uint32_t base = ptx::shared_address(s_.query[at_.warpgroup]) + row * kPanelRowBytes;
#pragma unroll
    for (int step = 0; step < kQuerySteps; ++step) {
      const int vector = (step % 4 * 2 + lane / 16) ^ (row % 8);  // the copy engine's swizzle
      ptx::load_matrices(queries[step], base + step / 4 * L::Queries::kPanelBytes + 16 * vector);
    }
    __syncwarp();
    arrive(address(s_.barriers.query_empty));
  }

  // The queries in shared memory may be overwritten.
  __device__ __forceinline__ void release_queries() {
    if constexpr (!kQueriesInRegisters) arrive(address(s_.barriers.query_empty));
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
  Reports<C> reports_;
  Visit visit_;
  int plain_begin_, plain_count_;  // tiles whose scores are final as they come
  float threshold_;                // as a difference of raw scores
  Ring<L::kKeyStages> keys_;       // the next to score
  Ring<L::kKeyStages> scored_;     // the next to give back
  uint32_t query_phase_ = 0;
};

}  // namespace blasst::cuda::prefill
