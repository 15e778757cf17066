// A consumer warpgroup: scores, decisions, softmax and outputs of its 64 query rows.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>

#include "blasst/blasst.h"
#include "cuda/core/skipped_mass.cuh"
#include "cuda/sm90/prefill/config.cuh"
#include "cuda/sm90/prefill/request.cuh"
#include "cuda/sm90/prefill/schedule.h"

namespace blasst::cuda::prefill {

// The gap histogram's bin.
__device__ __forceinline__ int gap_bin(float gap) {
  constexpr int kInner = BLASST_GAP_BINS - 2;
  constexpr float kRange = BLASST_GAP_RANGE;
  if (!(gap < 0)) return BLASST_GAP_BINS - 1;
  if (gap < -kRange) return 0;
  return min(kInner, 1 + static_cast<int>((gap + kRange) * (kInner / kRange)));
}

// Where a thread's scores are: rows lane / 4 and that + 8 of its warp's 16, pairs of keys from
// 2 * (lane % 4) in every 8.
struct ThreadPlace {
  const int warpgroup = ptx::warp_uniform(threadIdx.x / 128) - 1;
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int row(int r) const {
    return threadIdx.x % 128 / 32 * 16 + lane() / 4 + 8 * r;
  }
  __device__ __forceinline__ int column() const { return 2 * (lane() % 4); }
};

// The largest of a thread's scores in each of its two rows.
template <int kCount>
__device__ __forceinline__ void tile_maxima(const float (&s)[kCount], float (&maximum)[2]) {
  // Eight chains side by side: one after the other they would wait for their own results.
  float part[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) part[e] = s[e];
#pragma unroll
  for (int j = 8; j < kCount; j += 8) {
#pragma unroll
    for (int e = 0; e < 8; ++e) part[e] = ptx::max_nan(part[e], s[j + e]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    maximum[r] = ptx::max_nan(ptx::max_nan(part[2 * r], part[2 * r + 1]),
                              ptx::max_nan(part[2 * r + 4], part[2 * r + 5]));
  }
}

// Of the four threads that share a row.
__device__ __forceinline__ void quad_maxima(float (&x)[2]) {
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
    float other[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) other[r] = __shfl_xor_sync(0xffffffffu, x[r], lanes);
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = fmaxf(x[r], other[r]);
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// tanh to float32's precision in absolute terms.
__device__ __forceinline__ float tanh_exact(float x) {
  return 1 - __fdividef(2, 1 + ptx::exp2_approx(2 * kLog2e * x));
}

// One consumer warpgroup. What the loop over tiles needs is in registers: queries, a tile's scores
// and probabilities, outputs. The rest is read from `work` when needed. Nothing hides what stands
// between two products, so that is kept short: addresses come from one base, a tile from the last.
template <typename C>
class Consumer {
 public:
  __device__ Consumer(const Params& p, typename C::Shared& s)
      : p_(p), s_(s), base_(ptx::opaque(ptx::shared_address(&s))) {}

  __device__ void run() {
    Ring<2> works;
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
  static constexpr int kOutputs = C::kDim / 2;
  // Three warpgroups, or wider outputs, leave no room for them.
  static constexpr bool kQueriesInRegisters = C::kDim == 128;

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    ptx::mbarrier_arrive_if(barrier, at_.lane() == 0);
  }

  // This warpgroup's rows of the block; may be negative.
  __device__ __forceinline__ int rows(const Work& work) const {
    return min(kRowsPerWarpgroup, work.rows - at_.warpgroup * kRowsPerWarpgroup);
  }
  // Its first row's position.
  __device__ __forceinline__ int position(const Work& work) const {
    return work.first_row + work.offset + at_.warpgroup * kRowsPerWarpgroup;
  }

  // Tiles that a row of this warpgroup sees.
  __device__ __forceinline__ KeyRange visible_tiles(const Work& work) const {
    const int first = position(work), count = rows(work);
    const KeyRange seen = keys_of(first, first + count - 1, work.least, work.most, work.keys);
    const bool any = count > 0 && work.least <= work.most && seen.begin < seen.end;
    if (!any) return {0, 0};
    return {seen.begin / C::kKeys, (seen.end + C::kKeys - 1) / C::kKeys};
  }

  __device__ __forceinline__ void begin(const Work& work, KeyRange tiles) {
    const KeyRange whole = whole_tiles(work);
    plain_begin_ = ptx::warp_uniform(whole.begin);
    plain_count_ = ptx::warp_uniform(p_.softcap > 0 ? 0 : whole.end - whole.begin);
    direction_ = p_.order == 0 ? 1 : -1;
    tile_ = tile_at(p_.order, tiles.begin, tiles.end, 0);
    next_tile_ = tile_at(p_.order, tiles.begin, tiles.end, 1);
    if constexpr (C::kReports) {
      if (p_.tile_bits && threadIdx.x % 128 == 0 && rows(work) > 0)
        for (int word = 0; word < p_.tile_words; ++word) bits_of(work)[word] = 0;
      if (p_.tile_maxima && rows(work) > 0)
        for (int64_t tile = threadIdx.x % 128; tile < p_.tile_maxima_stride; tile += 128)
          maxima_of(work)[tile] = -INFINITY;
    }
    if constexpr (C::kTests) {
      kept_ = 0;
      threshold_ = work.threshold[at_.warpgroup];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      maximum_[r] = -INFINITY, sum_[r] = 0, mass_[r] = SkippedMass::none();
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) o_[j] = 0;
  }

  // The next key stage is filled.
  __device__ __forceinline__ void wait_keys() const {
    ptx::mbarrier_wait(base_ + offsetof(Shared, barriers.key_full) + 8 * keys_.stage, keys_.phase);
  }

  // s = Q K^T of the next key stage.
  __device__ __forceinline__ void start_scores(float (&s)[kScores]) {
    const uint64_t q = ptx::advance(ptx::wgmma_descriptor(base_ + offsetof(Shared, query)),
                                    at_.warpgroup * L::kQueryBytes);
    const uint64_t k = ptx::advance(ptx::wgmma_descriptor(base_ + offsetof(Shared, key)),
                                    keys_.stage * L::kTileBytes);
    using Product = ptx::Wgmma<Element, C::kKeys>;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      const uint64_t a = ptx::advance(q, panel * L::kQueryPanelBytes + within);
      const uint64_t b = ptx::advance(k, panel * L::kKeyPanelBytes + within);
      if constexpr (kQueriesInRegisters)
        step == 0 ? Product::first_registers(s, q_[step], b)
                  : Product::more_registers(s, q_[step], b);
      else
        step == 0 ? Product::first(s, a, b) : Product::more(s, a, b);
    }
    ptx::wgmma_commit();
    keys_.next();
  }

  // This warpgroup's queries, from shared memory, as the first operand of wgmma: for each 16
  // elements of d, 16 x 16 in four 8 x 8 matrices a warp.
  __device__ __forceinline__ void load_queries() {
    const int lane = at_.lane(), row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const uint32_t base = ptx::shared_address(s_.query[at_.warpgroup]) + row * kPanelRowBytes;
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      const int vector = (step % 4 * 2 + lane / 16) ^ (row % 8);  // the copy engine's swizzle
      ptx::load_matrices(q_[step], base + step / 4 * L::kQueryPanelBytes + 16 * vector);
    }
    __syncwarp();
    arrive(address(s_.barriers.query_empty));
  }

  // The queries in shared memory may be overwritten.
  __device__ __forceinline__ void release_queries() {
    if constexpr (!kQueriesInRegisters) arrive(address(s_.barriers.query_empty));
  }

  // The scores are there: their keys may be overwritten.
  __device__ __forceinline__ void finish_scores(float (&s)[kScores]) {
    ptx::pin(s);
    arrive(base_ + offsetof(Shared, barriers.key_empty) + 8 * scored_.stage);
    scored_.next();
  }

  // This warp no longer needs the values of a visit.
  __device__ __forceinline__ void release_values(int visit) {
    arrive(base_ + offsetof(Shared, barriers.value_done) + 8 * (visit % L::kValueBarriers));
  }

  // Keys that every row of this warpgroup sees, in whole tiles. Rows beyond the request see none.
  __device__ __forceinline__ KeyRange whole_tiles(const Work& work) const {
    const int first = position(work), count = rows(work), last = first + max(count, 1) - 1;
    const int begin = max(0, last - work.most), end = min(work.keys, first - work.least + 1);
    const KeyRange tiles = {(begin + C::kKeys - 1) / C::kKeys, end / C::kKeys};
    return count == kRowsPerWarpgroup && tiles.begin < tiles.end ? tiles : KeyRange{0, 0};
  }

  // Caps the scores, and masks what a row does not see.
  __device__ __forceinline__ void treat(float (&s)[kScores], const Work& work) {
    if (p_.softcap > 0) {
#pragma unroll
      for (int j = 0; j < kScores; ++j) s[j] = tanh_exact(s[j] * p_.softcap_scale);
    }
    const KeyRange whole = whole_tiles(work);
    if (tile_ < whole.begin || tile_ >= whole.end) mask(s, work);
  }

  // Scores of keys that a row does not see become -inf.
  __device__ __forceinline__ void mask(float (&s)[kScores], const Work& work) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at_.row(r);
      const int at = position(work) + row;
      const KeyRange seen = keys_of(at, at, work.least, work.most, work.keys);
      const int first = tile_ * C::kKeys + at_.column();
      const int begin = seen.begin - first, end = (row < rows(work) ? seen.end : 0) - first;
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * r + e];
          x = 8 * j + e >= begin && 8 * j + e < end ? x : -INFINITY;
        }
      }
    }
  }

  // Completes the scores of visit_ and takes their maxima. Returns whether the tile is kept.
  __device__ __forceinline__ bool decide(float (&s)[kScores], const Work& work) {
    special_ = static_cast<unsigned>(tile_ - plain_begin_) >= static_cast<unsigned>(plain_count_);
    if (special_) [[unlikely]]
      treat(s, work);
    tile_maxima(s, tile_maximum_);
    if constexpr (!C::kTests) {
      return true;
    } else {
      bool skip = true;
#pragma unroll
      for (int r = 0; r < 2; ++r) skip = skip && tile_maximum_[r] < skip_below(maximum_[r]);
      if constexpr (C::kReports) offer_gap(), offer_maximum();
      return __any_sync(0xffffffffu, !ptx::named_barrier_all(1 + at_.warpgroup, 128, skip));
    }
  }

  // Tells the producers what was decided on visit_, and counts it.
  __device__ __forceinline__ void announce(const Work& work, bool keep) {
    if constexpr (C::kTests) {
      const uint32_t decision =
          base_ + offsetof(Shared, decision) + visit_ % L::kValueStages * sizeof(*s_.decision);
      ptx::raise_shared_if(decision + 4 * at_.warpgroup, 2 * visit_ + keep, threadIdx.x % 128 == 0);
      if constexpr (C::kReports) report_tile(work, keep);
      kept_ += keep;
      if (!keep) release_values(visit_);
    }
  }

  // The largest gap of each warp's rows, in natural logarithms, for report_tile after the vote.
  __device__ __forceinline__ void offer_gap() {
    float gap = -INFINITY;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float t = tile_maximum_[r];
      if (t == -INFINITY) continue;
      // A row's first scores, and NaN, have no finite gap.
      const float g =
          maximum_[r] == -INFINITY ? INFINITY : (t - maximum_[r]) * (p_.score_to_log2 * kLn2);
      gap = g <= gap ? gap : (g < INFINITY ? g : INFINITY);
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2)
      gap = fmaxf(gap, __shfl_xor_sync(0xffffffffu, gap, lanes));
    if (at_.lane() == 0) s_.gap[visit_ % 2][at_.warpgroup][threadIdx.x % 128 / 32] = gap;
  }

  // The largest score of each warp's rows, NaN if there is one; for report_tile too.
  __device__ __forceinline__ void offer_maximum() {
    float maximum = ptx::max_nan(tile_maximum_[0], tile_maximum_[1]);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2)
      maximum = ptx::max_nan(maximum, __shfl_xor_sync(0xffffffffu, maximum, lanes));
    if (at_.lane() == 0)
      s_.maximum[visit_ % 2][at_.warpgroup][threadIdx.x % 128 / 32] =
          maximum * (p_.score_to_log2 * kLn2);
  }

  // Where this warpgroup's rows stand among the query tiles of all heads and requests.
  __device__ __forceinline__ int64_t tile_row(const Work& work) const {
    return int64_t{work.head} * work.query_tiles + work.query_tile + at_.warpgroup;
  }

  // The tile bits of this warpgroup's rows.
  __device__ __forceinline__ unsigned* bits_of(const Work& work) const {
    return p_.tile_bits + tile_row(work) * p_.tile_words;
  }

  // The tile maxima of this warpgroup's rows.
  __device__ __forceinline__ float* maxima_of(const Work& work) const {
    return p_.tile_maxima + tile_row(work) * p_.tile_maxima_stride;
  }

  __device__ __forceinline__ void report_tile(const Work& work, bool keep) {
    const int tile = tile_;
    const KeyRange visible = visible_tiles(work);
    if (tile < visible.begin || tile >= visible.end) return;
    if (threadIdx.x % 128 == 0) {
      if (p_.tile_bits && keep) atomicOr(bits_of(work) + tile / 32, 1u << tile % 32);
      if (p_.gap_histogram) {
        const float(&warps)[4] = s_.gap[visit_ % 2][at_.warpgroup];
        const float gap = fmaxf(fmaxf(warps[0], warps[1]), fmaxf(warps[2], warps[3]));
        atomicAdd(p_.gap_histogram + work.head * BLASST_GAP_BINS + gap_bin(gap), 1ull);
      }
      if (p_.tile_maxima) {
        const float(&warps)[4] = s_.maximum[visit_ % 2][at_.warpgroup];
        maxima_of(work)[tile] =
            ptx::max_nan(ptx::max_nan(warps[0], warps[1]), ptx::max_nan(warps[2], warps[3]));
      }
    }
    if (keep) return;
    quad_maxima(tile_maximum_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float maximum = tile_maximum_[r];
      const int at = position(work) + at_.row(r);
      const KeyRange seen = keys_of(at, at, work.least, work.most, work.keys);
      const int keys = min(seen.end, (tile + 1) * C::kKeys) - max(seen.begin, tile * C::kKeys);
      if (maximum == -INFINITY || keys <= 0) continue;
      mass_[r].add(maximum * p_.score_to_log2, keys);
    }
  }

  // What a tile's maximum must stay under for a skip. A row without a score so far allows a skip
  // only where it has none in the tile either: -inf < -FLT_MAX.
  __device__ __forceinline__ float skip_below(float maximum) const {
    const float below =
        p_.test == BLASST_TEST_ABSOLUTE && maximum != -INFINITY ? threshold_ : maximum + threshold_;
    return fmaxf(below, -FLT_MAX);
  }

  // The running maximum as a base-2 logarithm; 0 if there is none.
  __device__ __forceinline__ float log2_maximum(int r) const {
    return maximum_[r] == -INFINITY ? 0.f : __fmul_rn(maximum_[r], p_.score_to_log2);
  }

  // Moves the running maxima to those of a kept tile, and scales what was summed under the old
  // ones.
  __device__ __forceinline__ void move_maxima() {
    float alpha[2];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float old = maximum_[r];
      maximum_[r] = fmaxf(old, tile_maximum_[r]);
      moved |= maximum_[r] != old;
      alpha[r] = ptx::exp2_approx(__fmul_rn(old, p_.score_to_log2) - log2_maximum(r));
    }
    if (!__any_sync(0xffffffffu, moved)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] *= alpha[r];
#pragma unroll
      for (int j = 0; j < kOutputs / 4; ++j)
        o_[4 * j + 2 * r] *= alpha[r], o_[4 * j + 2 * r + 1] *= alpha[r];
    }
  }

  // Probabilities, in the element type, from the scores of a tile. Two halves, each with sums of
  // its own: the assembler orders that better than one.
  __device__ __forceinline__ void exponentials(const float (&s)[kScores],
                                               uint32_t (&p)[kScores / 2]) {
    constexpr int kHalf = kScores / 2;
    const float minus_maximum[2] = {-log2_maximum(0), -log2_maximum(1)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[2][2] = {};
#pragma unroll
      for (int j = 0; j < kHalf / 4; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float x[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            x[e] = ptx::exp2_approx(
                fmaf(s[half * kHalf + 4 * j + 2 * r + e], p_.score_to_log2, minus_maximum[r]));
            sums[r][e] += x[e];
          }
          p[half * kHalf / 2 + 2 * j + r] = ptx::pack2<Element>(x[0], x[1]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) sum_[r] += sums[r][0] + sums[r][1];
    }
  }

  // The values of visit_ are there.
  __device__ __forceinline__ void wait_values(const Work& work) {
    ptx::mbarrier_wait(
        base_ + offsetof(Shared, barriers.value_full) + 8 * (visit_ % L::kValueBarriers),
        visit_ / L::kValueBarriers & 1);
    if (special_) [[unlikely]]
      clear_values(base_ + offsetof(Shared, value) + visit_ % L::kValueStages * L::kTileBytes,
                   work.keys - tile_ * C::kKeys);
  }

  // o += P V of visit_.
  __device__ __forceinline__ void start_outputs(const uint32_t (&p)[kScores / 2],
                                                const Work& work) {
    wait_values(work);
    const uint64_t v =
        ptx::advance(ptx::wgmma_descriptor(base_ + offsetof(Shared, value), L::kKeyPanelBytes),
                     visit_ % L::kValueStages * L::kTileBytes);
    ptx::pin(o_);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step) {
      ptx::Wgmma<Element, C::kDim>::registers(o_, p + 4 * step,
                                              ptx::advance(v, 16 * step * kPanelRowBytes));
    }
    ptx::wgmma_commit();
  }

  // The outputs are there, those of `visit` the newest.
  __device__ __forceinline__ void finish_outputs(int visit) {
    ptx::wgmma_wait<0>();
    ptx::pin(o_);
    release_values(visit);
  }

  // What lies behind the last key may be anything, NaN too, and 0 * NaN is not 0.
  __device__ __forceinline__ void clear_values(uint32_t stage, int valid) {
    if (valid >= C::kKeys) return;
    const int vectors = (C::kKeys - valid) * (kPanelRowBytes / 16);
#pragma unroll 1
    for (int panel = 0; panel < L::kPanels; ++panel) {
      const uint32_t first = stage + panel * L::kKeyPanelBytes + valid * kPanelRowBytes;
#pragma unroll 1
      for (int i = threadIdx.x % 128; i < vectors; i += 128)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(first + 16 * i), "r"(0));
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + at_.warpgroup, 128);
  }

  __device__ __forceinline__ void next_visit() {
    ++visit_;
    tile_ = next_tile_;
    next_tile_ += direction_;
  }

  // Scores that are on their way, older than the kPending newest products, arrive and are decided
  // on. With a test and `more` to come, the keys after them are waited for while there is nothing
  // else to do.
  template <int kPending>
  __device__ __forceinline__ bool take_scores(float (&s)[kScores], const Work& work, bool more) {
    if (C::kTests && more) wait_keys();
    ptx::wgmma_wait<kPending>();
    finish_scores(s);
    return decide(s, work);
  }

  // The tiles of an item. The scores of the next tile and the outputs of a kept one are computed
  // together; then come the next tile's decision and exponentials, under the products of the other
  // warpgroups. After a skipped tile the next scores start before its fate is announced.
  __device__ __forceinline__ void attend_tiles(const Work& work, int count) {
    float s[kScores];
    uint32_t p[kScores / 2];
    wait_keys();
    start_scores(s);
    bool keep = take_scores<0>(s, work, count > 1);
#pragma unroll 1
    for (;;) {
      if (!keep) {
#pragma unroll 1
        do {
          if (--count == 0) {
            announce(work, false);
            return release_queries();
          }
          start_scores(s);
          announce(work, false);
          next_visit();
        } while (!take_scores<0>(s, work, count > 1));
      }
      announce(work, true);
      quad_maxima(tile_maximum_);
#pragma unroll 1
      do {
        move_maxima();
        exponentials(s, p);
        if (--count == 0) {
          release_queries();
          start_outputs(p, work);
          return finish_outputs(visit_);
        }
        if constexpr (!C::kTests) wait_keys();
        start_scores(s);
        start_outputs(p, work);
        next_visit();
        keep = take_scores<1>(s, work, count > 1);
        if (keep) {
          announce(work, true);
          quad_maxima(tile_maximum_);
          if constexpr (!C::kTests) hold(tile_maximum_[0] + tile_maximum_[1]);
        }
        finish_outputs(visit_ - 1);
      } while (keep);
    }
  }

  __device__ __forceinline__ void attend(const Work& work) {
    const KeyRange tiles = {ptx::warp_uniform(work.tile_begin), ptx::warp_uniform(work.tile_end)};
    begin(work, tiles);
    const int count = tiles.end - tiles.begin;
    if (count > 0) {
      ptx::mbarrier_wait(address(s_.barriers.query_full), query_phase_);
      query_phase_ ^= 1;
      if constexpr (kQueriesInRegisters) load_queries();
      attend_tiles(work, count);
      ++visit_;
    }
    finish(work);
  }

  // Never stores. It keeps the assembler from moving a wait that follows to before `x` is there.
  // (With a tile test, the vote does.)
  __device__ __forceinline__ void hold(float x) const {
    ptx::store_shared_if(base_, __float_as_int(x), p_.order < 0);
  }

  // Normalises and writes the rows.
  __device__ __forceinline__ void finish(const Work& work) {
    const int count = rows(work);
    const int output_row = work.output_row + at_.warpgroup * kRowsPerWarpgroup;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = quad_sum(sum_[r]), base = log2_maximum(r), weight = 1;
      const bool empty = maximum_[r] == -INFINITY && sum == 0;
      const float sink = p_.sinks ? p_.sinks[work.head] : -INFINITY;
      if (p_.sinks && !empty) {  // it may lie far above every score
        const float kept = base;
        base = fmaxf(kept, sink * kLog2e);
        weight = ptx::exp2_approx(kept - base);
        sum = sum * weight + ptx::exp2_approx(sink * kLog2e - base);
      }
      inverse[r] = empty ? 0.f : weight / sum;
      if (p_.lse && at_.lane() % 4 == 0 && at_.row(r) < count) {
        p_.lse[int64_t{work.head} * p_.rows + output_row + at_.row(r)] =
            empty ? sink : base * kLn2 + logf(sum);
      }
      if constexpr (C::kReports) {
        if (p_.dropped_mass_bound && at_.lane() % 4 == 0 && at_.row(r) < count) {
          p_.dropped_mass_bound[int64_t{work.head} * p_.rows + output_row + at_.row(r)] =
              mass_[r].share(base, sum);
        }
      }
    }
    if constexpr (C::kTests) {
      if (threadIdx.x % 128 == 0 && count > 0) {
        const KeyRange visible = visible_tiles(work);
        const int64_t cell = int64_t{work.request} * p_.heads + work.head;
        const int visitable = visible.end - visible.begin;
        if (p_.visitable) atomicAdd(p_.visitable + cell, 1ull * visitable);
        if (p_.skipped) atomicAdd(p_.skipped + cell, 1ull * (visitable - kept_));
      }
    }
    auto* out = static_cast<Element*>(p_.out) + work.head * p_.out_stride_head +
                row_in_tensor(p_, work.request, output_row) * p_.out_stride_token;
    if (!p_.cu_seqlens_q) out += work.request * p_.out_stride_request;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at_.row(r);
      Element* to = out + row * p_.out_stride_token + 8 * (at_.lane() % 4);
      // The four threads of a row trade pairs, so that each has eight elements side by side.
#pragma unroll
      for (int j = 0; j < C::kDim / 32; ++j) {
        uint32_t x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &o_[16 * j + 4 * e + 2 * r];
          x[e] = ptx::pack2<Element>(pair[0] * inverse[r], pair[1] * inverse[r]);
        }
        transpose_in_quad(x);
        if (row < count)
          *reinterpret_cast<uint4*>(to + 32 * j) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }

  // x[e] of lane l goes to x[l] of lane e, among four lanes.
  __device__ __forceinline__ void transpose_in_quad(uint32_t (&x)[4]) {
    const bool odd = at_.lane() & 1, high = at_.lane() & 2;
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? x[e] : x[e + 1], 1);
      (odd ? x[e] : x[e + 1]) = got;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? x[e] : x[e + 2], 2);
      (high ? x[e] : x[e + 2]) = got;
    }
  }

  const Params& p_;
  Shared& s_;
  const uint32_t base_;  // address of s_
  const ThreadPlace at_;
  int plain_begin_, plain_count_;  // tiles whose scores are final as they come
  int tile_, next_tile_, direction_;
  bool special_;     // tile_ is not one of those
  int visit_ = 0;    // of tile_, among all that this warpgroup has seen
  int kept_;         // tiles of this item
  float threshold_;  // as a difference of raw scores
  uint32_t q_[C::kDim / 16][4];
  // Online softmax of this thread's two rows. Maxima are of raw scores; times score_to_log2 they
  // are base-2 logarithms.
  float maximum_[2];       // running
  float sum_[2];           // of this thread's keys
  float tile_maximum_[2];  // of the rows in tile_
  SkippedMass mass_[2];    // reports only
  float o_[kOutputs];
  Ring<L::kKeyStages> keys_;    // the next to score
  Ring<L::kKeyStages> scored_;  // the next to give back
  uint32_t query_phase_ = 0;
};

}  // namespace blasst::cuda::prefill
