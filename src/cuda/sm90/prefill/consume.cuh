// A consumer warpgroup: scores, decisions, softmax and outputs of its 64 query rows.
#pragma once

#include <cfloat>
#include <cmath>

#include "blasst/blasst.h"
#include "cuda/sm90/prefill/config.cuh"
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

template <int kCount>
__device__ __forceinline__ void tile_maxima(const float (&s)[kCount], float (&maximum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float part[4] = {s[2 * r], s[2 * r + 1], s[2 * r + 4], s[2 * r + 5]};
#pragma unroll
    for (int j = 8; j < kCount; j += 8) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        part[e] = ptx::max_nan(part[e], s[j + 2 * r + (e & 1) + 2 * (e & 2)]);
    }
    maximum[r] = ptx::max_nan(ptx::max_nan(part[0], part[1]), ptx::max_nan(part[2], part[3]));
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// tanh to float32's precision in absolute terms.
__device__ __forceinline__ float tanh_exact(float x) {
  return 1 - __fdividef(2, 1 + ptx::exp2_approx(2 * kLog2e * x));
}

// One consumer warpgroup. What the loop over tiles needs is in registers, which are scarce: two
// tiles of scores and the outputs take 192 of 240. The rest is read from `work` when needed.
template <typename C>
class Consumer {
 public:
  __device__ Consumer(const Params& p, typename C::Shared& s) : p_(p), s_(s) {}

  __device__ void run() {
    Ring<2> works;
    for (;;) {
      ptx::mbarrier_wait(address(s_.barriers.work_full[works.stage]), works.phase);
      const Work& work = s_.work[works.stage];
      if (ptx::warp_uniform(work.rows) == 0) return;
      attend(work);
      arrive(s_.barriers.work_empty[works.stage]);
      works.next();
    }
  }

 private:
  using L = typename C::Layout;
  using Element = typename C::Element;
  static constexpr int kScores = C::kKeys / 2;  // a thread's share of a tile's scores
  static constexpr int kOutputs = C::kDim / 2;
  static constexpr int kParts = 2;  // of a tile's keys, from scores to outputs
  static constexpr int kPart = kScores / kParts;

  __device__ __forceinline__ void arrive(uint64_t& barrier) {
    ptx::mbarrier_arrive_if(address(barrier), at_.lane() == 0);
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

  __device__ __forceinline__ void begin(const Work& work) {
    tile_begin_ = ptx::warp_uniform(work.tile_begin);
    tile_end_ = ptx::warp_uniform(work.tile_end);
    const int first = position(work), count = rows(work), last = first + max(count, 1) - 1;
    // Keys that every row sees; rows beyond the request see none.
    const int begin = max(0, last - work.most), end = min(work.keys, first - work.least + 1);
    const bool all = count == kRowsPerWarpgroup && begin < end;
    whole_begin_ = ptx::warp_uniform(all ? (begin + C::kKeys - 1) / C::kKeys : kUnlimited);
    whole_end_ = ptx::warp_uniform(all ? end / C::kKeys : 0);
    if constexpr (C::kReports) {
      if (p_.tile_bits && threadIdx.x % 128 == 0 && count > 0)
        for (int word = 0; word < p_.tile_words; ++word) bits_of(work)[word] = 0;
    }
    if constexpr (C::kTests) {
      kept_ = 0;
      threshold_ = -INFINITY;
      if (p_.test != BLASST_TEST_NONE) {
        float value = p_.thresholds[work.request * p_.threshold_stride_request +
                                    work.head * p_.threshold_stride_head];
        if (p_.test == BLASST_TEST_SCALE_FACTOR) value /= work.keys;
        if (p_.test != BLASST_TEST_ABSOLUTE) value = logf(fminf(value, 1.f));
        threshold_ = value * kLog2e / p_.score_to_log2;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) maximum_[r] = -INFINITY, sum_[r] = 0, dropped_[r] = 0;
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) o_[j] = 0;
  }

  __device__ __forceinline__ int tile(int i) const {
    return tile_at(p_.order, tile_begin_, tile_end_, i);
  }

  // s = Q K^T of the next key stage.
  __device__ __forceinline__ void start_scores(float (&s)[kScores]) {
    ptx::mbarrier_wait(address(s_.barriers.key_full[keys_.stage]), keys_.phase);
    const uint64_t q = ptx::wgmma_descriptor(ptx::shared_address(s_.query[at_.warpgroup]));
    const uint64_t k = ptx::wgmma_descriptor(ptx::shared_address(s_.key[keys_.stage]));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      const uint64_t a = q + ((panel * L::kQueryPanelBytes + within) >> 4);
      const uint64_t b = k + ((panel * L::kKeyPanelBytes + within) >> 4);
      if (step == 0)
        ptx::Wgmma<Element, C::kKeys>::first(s, a, b);
      else
        ptx::Wgmma<Element, C::kKeys>::more(s, a, b);
    }
    ptx::wgmma_commit();
    keys_.next();
  }

  // The oldest scores are there: their keys may be overwritten.
  __device__ __forceinline__ void release_keys() {
    arrive(s_.barriers.key_empty[scored_.stage]);
    scored_.next();
  }

  // This warp no longer needs the values of visit i.
  __device__ __forceinline__ void release_values(int i) {
    arrive(s_.barriers.value_done[(visit_ + i) % L::kValueBarriers]);
  }

  // Scores of keys that a row does not see become -inf.
  __device__ __forceinline__ void mask(float (&s)[kScores], const Work& work, int tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at_.row(r);
      const int at = position(work) + row;
      const KeyRange seen = keys_of(at, at, work.least, work.most, work.keys);
      const int first = tile * C::kKeys + at_.column();
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

  // Masks the scores of visit i, takes their maxima, and decides. Returns whether the tile is kept.
  __device__ __forceinline__ bool decide(float (&s)[kScores], const Work& work, int i) {
    const int tile = this->tile(i);
    if (p_.softcap > 0) {
#pragma unroll
      for (int j = 0; j < kScores; ++j) s[j] = tanh_exact(s[j] * p_.softcap_scale);
    }
    if (tile < whole_begin_ || tile >= whole_end_) mask(s, work, tile);
    tile_maxima(s, tile_maximum_);
    if constexpr (!C::kTests) {
      // Never stored. It keeps the assembler from moving the wait for the outputs, which follows,
      // to before the maxima. (With a tile test, the vote does.)
      ptx::store_shared_if(ptx::shared_address(&s_.decision[0][0]),
                           __float_as_int(fmaxf(tile_maximum_[0], tile_maximum_[1])), p_.order < 0);
      return true;
    } else {
      bool vote = true;
#pragma unroll
      for (int r = 0; r < 2; ++r) vote = vote && tile_maximum_[r] < skip_below(maximum_[r]);
      if constexpr (C::kReports) offer_gap(i);
      const bool keep = !ptx::warp_uniform(ptx::named_barrier_all(1 + at_.warpgroup, 128, vote));
      ptx::store_shared_if(
          ptx::shared_address(&s_.decision[(visit_ + i) % L::kValueStages][at_.warpgroup]),
          2 * (visit_ + i) + keep, at_.lane() == 0);
      if constexpr (C::kReports) report_tile(work, i, keep);
      kept_ += keep;
      if (!keep) release_values(i);
      return keep;
    }
  }

  // The largest gap of each warp's rows, in natural logarithms, for report_tile after the vote.
  __device__ __forceinline__ void offer_gap(int i) {
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
    if (at_.lane() == 0) s_.gap[i % 2][at_.warpgroup][threadIdx.x % 128 / 32] = gap;
  }

  // The tile bits of this warpgroup's rows.
  __device__ __forceinline__ unsigned* bits_of(const Work& work) const {
    const int64_t row = int64_t{work.head} * work.query_tiles + work.query_tile + at_.warpgroup;
    return p_.tile_bits + row * p_.tile_words;
  }

  __device__ __forceinline__ void report_tile(const Work& work, int i, bool keep) {
    const int tile = this->tile(i);
    const KeyRange visible = visible_tiles(work);
    if (tile < visible.begin || tile >= visible.end) return;
    if (threadIdx.x % 128 == 0) {
      if (p_.tile_bits && keep) atomicOr(bits_of(work) + tile / 32, 1u << tile % 32);
      if (p_.gap_histogram) {
        const float(&warps)[4] = s_.gap[i % 2][at_.warpgroup];
        const float gap = fmaxf(fmaxf(warps[0], warps[1]), fmaxf(warps[2], warps[3]));
        atomicAdd(p_.gap_histogram + work.head * BLASST_GAP_BINS + gap_bin(gap), 1ull);
      }
    }
    if (keep) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float maximum = quad_max(tile_maximum_[r]);
      const int at = position(work) + at_.row(r);
      const KeyRange seen = keys_of(at, at, work.least, work.most, work.keys);
      const int keys = min(seen.end, (tile + 1) * C::kKeys) - max(seen.begin, tile * C::kKeys);
      if (maximum == -INFINITY || keys <= 0) continue;
      dropped_[r] += keys * ptx::exp2_approx((maximum - maximum_[r]) * p_.score_to_log2);
    }
  }

  // What a tile's maximum must stay under for a skip. A row without a score so far allows a skip
  // only where it has none in the tile either: -inf < -FLT_MAX.
  __device__ __forceinline__ float skip_below(float maximum) const {
    const float below =
        p_.test == BLASST_TEST_ABSOLUTE && maximum != -INFINITY ? threshold_ : maximum + threshold_;
    return fmaxf(below, -FLT_MAX);
  }

  // Moves the running maxima and scales what was summed under the old ones.
  __device__ __forceinline__ void move_maxima(float (&minus_maximum)[2]) {
    float alpha[2];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float old = maximum_[r];
      const float maximum = fmaxf(old, quad_max(tile_maximum_[r]));
      moved |= maximum != old;
      const float scaled = maximum == -INFINITY ? 0.f : __fmul_rn(maximum, p_.score_to_log2);
      alpha[r] = ptx::exp2_approx(__fmul_rn(old, p_.score_to_log2) - scaled);
      minus_maximum[r] = -scaled;
      maximum_[r] = maximum;
    }
    if (!__any_sync(0xffffffffu, moved)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] *= alpha[r];
      if constexpr (C::kReports) dropped_[r] *= alpha[r];
#pragma unroll
      for (int j = 0; j < kOutputs / 4; ++j)
        o_[4 * j + 2 * r] *= alpha[r], o_[4 * j + 2 * r + 1] *= alpha[r];
    }
  }

  // Probabilities of a part of the tile's keys, in the element type, from its scores.
  __device__ __forceinline__ void exponentials(const float (&s)[kScores], int part,
                                               const float (&minus_maximum)[2],
                                               uint32_t (&p)[kPart / 2]) {
    float sums[2][2] = {};
#pragma unroll
    for (int j = 0; j < kPart / 4; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = ptx::exp2_approx(
              fmaf(s[part * kPart + 4 * j + 2 * r + e], p_.score_to_log2, minus_maximum[r]));
          sums[r][e] += x[e];
        }
        p[2 * j + r] = ptx::pack2<Element>(x[0], x[1]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum_[r] += sums[r][0] + sums[r][1];
  }

  // o += P V from the scores of visit i. A part's products start while the next part's
  // exponentials are still to come.
  __device__ __forceinline__ void start_outputs(float (&s)[kScores], const Work& work, int i) {
    float minus_maximum[2];
    move_maxima(minus_maximum);
    const int visit = visit_ + i;
    const uint32_t stage = ptx::shared_address(s_.value[visit % L::kValueStages]);
    const uint64_t v = ptx::wgmma_descriptor(stage, L::kKeyPanelBytes);
    uint32_t p[kParts][kPart / 2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      exponentials(s, part, minus_maximum, p[part]);
      if (part == 0) {
        ptx::mbarrier_wait(address(s_.barriers.value_full[visit % L::kValueBarriers]),
                           visit / L::kValueBarriers & 1);
        const int tile = this->tile(i);
        if (tile >= whole_end_) clear_values(stage, work.keys - tile * C::kKeys);
      }
      ptx::pin(o_);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kPart / 8; ++step) {
        const int row = (part * kPart / 8 + step) * 16;
        ptx::Wgmma<Element, C::kDim>::registers(o_, p[part] + 4 * step,
                                                v + (row * kPanelRowBytes >> 4));
      }
      ptx::wgmma_commit();
    }
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

  // `current` holds the scores of visit i, whose fate is `keep`; those of visit i + 1 are on their
  // way to `next` and are there on return, those of i + 2 (if kMore) on their way to `current`.
  // Returns whether visit i + 1 is kept.
  template <bool kMore>
  __device__ __forceinline__ bool step(float (&current)[kScores], float (&next)[kScores],
                                       const Work& work, int i, bool keep) {
    if (!C::kTests || keep) {
      start_outputs(current, work, i);
      ptx::wgmma_wait<kParts>();
      ptx::pin(next);
      release_keys();
      // Under the tensor cores' work on this tile's outputs.
      const bool keep_next = decide(next, work, i + 1);
      ptx::wgmma_wait<0>();
      ptx::pin(o_);
      release_values(i);
      if constexpr (kMore) start_scores(current);
      return keep_next;
    }
    // Under the tensor cores' work on the scores after the next.
    if constexpr (kMore) start_scores(current);
    ptx::wgmma_wait<kMore ? 1 : 0>();
    ptx::pin(next);
    release_keys();
    return decide(next, work, i + 1);
  }

  // The last visit: its scores are in `current`.
  __device__ __forceinline__ void last(float (&current)[kScores], const Work& work, int i,
                                       bool keep) {
    if (C::kTests && !keep) return;
    start_outputs(current, work, i);
    ptx::wgmma_wait<0>();
    ptx::pin(o_);
    release_values(i);
  }

  // The last two visits, from where step would find nothing more to start.
  __device__ __forceinline__ void last_two(float (&current)[kScores], float (&next)[kScores],
                                           const Work& work, int i, bool keep) {
    keep = step<false>(current, next, work, i, keep);
    arrive(s_.barriers.query_empty);
    last(next, work, i + 1, keep);
  }

  __device__ __forceinline__ void attend(const Work& work) {
    begin(work);
    const int count = tile_end_ - tile_begin_;
    if (count > 0) {
      float even[kScores], odd[kScores];
      ptx::mbarrier_wait(address(s_.barriers.query_full), query_phase_);
      query_phase_ ^= 1;
      start_scores(even);
      ptx::wgmma_wait<0>();
      ptx::pin(even);
      release_keys();
      bool keep = decide(even, work, 0);
      if (count == 1) {
        arrive(s_.barriers.query_empty);
        last(even, work, 0, keep);
      } else {
        start_scores(odd);
        for (int i = 0;;) {
          if (i + 2 == count) {
            last_two(even, odd, work, i, keep);
            break;
          }
          keep = step<true>(even, odd, work, i++, keep);
          if (i + 2 == count) {
            last_two(odd, even, work, i, keep);
            break;
          }
          keep = step<true>(odd, even, work, i++, keep);
        }
      }
      visit_ += count;
    }
    finish(work);
  }

  // Normalises and writes the rows.
  __device__ __forceinline__ void finish(const Work& work) {
    const int count = rows(work);
    const int output_row = work.output_row + at_.warpgroup * kRowsPerWarpgroup;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float maximum = maximum_[r];
      float sum = quad_sum(sum_[r]);
      const bool empty = maximum == -INFINITY && sum == 0;
      const float log2_maximum = maximum == -INFINITY ? 0.f : maximum * p_.score_to_log2;
      if (p_.sinks && !empty) sum += ptx::exp2_approx(p_.sinks[work.head] * kLog2e - log2_maximum);
      inverse[r] = empty ? 0.f : 1 / sum;
      if (p_.lse && at_.lane() % 4 == 0 && at_.row(r) < count) {
        p_.lse[int64_t{work.head} * p_.rows + output_row + at_.row(r)] =
            empty ? -INFINITY : log2_maximum * kLn2 + logf(sum);
      }
      if constexpr (C::kReports) {
        if (p_.dropped_mass_bound && at_.lane() % 4 == 0 && at_.row(r) < count) {
          p_.dropped_mass_bound[int64_t{work.head} * p_.rows + output_row + at_.row(r)] =
              empty ? 0.f : dropped_[r] / (dropped_[r] + sum);
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
    auto* out = static_cast<Element*>(p_.out) + work.head * p_.out_stride_head;
    if (p_.cu_seqlens_q) {
      out += output_row * p_.out_stride_token;
    } else {
      out += work.request * p_.out_stride_request +
             (work.first_row + at_.warpgroup * kRowsPerWarpgroup) * p_.out_stride_token;
    }
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
  typename C::Shared& s_;
  const ThreadPlace at_;
  int tile_begin_, tile_end_;    // visited by the block
  int whole_begin_, whole_end_;  // tiles whose keys all rows of this warpgroup see
  float threshold_;              // as a difference of raw scores
  // Online softmax of this thread's two rows. Maxima are of raw scores; times score_to_log2 they
  // are base-2 logarithms.
  float maximum_[2];       // running
  float sum_[2];           // of this thread's keys
  float tile_maximum_[2];  // of this thread's keys in the newest tile
  float o_[kOutputs];
  Ring<L::kKeyStages> keys_;    // the next to score
  Ring<L::kKeyStages> scored_;  // the next to give back
  uint32_t query_phase_ = 0;
  int visit_ = 0;     // tiles before this item
  int kept_;          // tiles of this item
  float dropped_[2];  // upper bound on the skipped probabilities, scaled like sum_; reports only
};

}  // namespace blasst::cuda::prefill
