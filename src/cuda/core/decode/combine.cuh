// From the results of work items to the output, a row of a query head at a time: a warp each where
// there are many, else a block each, a warp for each group of splits.
#pragma once

#include <cmath>

#include "cuda/core/decode/fold.cuh"
#include "cuda/core/decode/params.h"
#include "cuda/core/decode/queries.cuh"
#include "cuda/core/decode/splits.h"
#include "cuda/core/decode/turns.cuh"
#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/skipped_mass.cuh"

namespace blasst::cuda::decode {

inline constexpr int kMostCombineThreads = 256;

// Sums over keys of one row, relative to a maximum; a lane's share of the elements.
template <int kElements>
struct RowResult {
  float m = -INFINITY, l = 0;
  SkippedMass mass = SkippedMass::none();
  float o[kElements] = {};

  __device__ __forceinline__ void add(const RowResult& next, float log2_scale) {
    const FoldWeights weights(m, next.m, log2_scale);
    m = weights.maximum;
    l = weights(l, next.l);
    mass.add(next.mass);
#pragma unroll
    for (int i = 0; i < kElements; ++i) o[i] = weights(o[i], next.o[i]);
  }
};

// Where this kernel is set up while the attention kernel runs.
__device__ __forceinline__ void wait_for_items() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename T, int kValueDim>
class Combine {
  static constexpr int kSlices = combine_slices(kValueDim);
  static constexpr int kSlice = kValueDim / kSlices;
  static constexpr int kElements = (kSlice + 63) / 64 * 2;  // of a lane: pairs, 64 apart
  using Result = RowResult<kElements>;

 public:
  // Of a group (combine_shared_bytes).
  struct Shared {
    float m, l;
    SkippedMass mass;
    float o[kSlice];
  };

  __device__ __forceinline__ Combine(const Params& p, const Plan& plan, Shared* shared)
      : p_(p),
        plan_(plan),
        shared_(shared),
        warps_(blockDim.x / 32),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        group_(p.heads / p.kv_heads),
        log2_scale_(plan.unit_scale * kLog2e) {}

  __device__ __forceinline__ void run() {
    const int slices = p_.batch * p_.kv_heads * plan_.rows * kSlices;
    const bool in_warp = adds_in_warp(plan_, slices);
    const int index = in_warp ? blockIdx.x * warps_ + warp_ : blockIdx.x;
    if (index >= slices) return;
    slice_ = index % kSlices;
    if (!find(index / kSlices)) return;
    wait_for_items();
    if (index == 0 && threadIdx.x == 0) remove_signature(plan_.turns);
    in_warp ? add_in_warp() : add_in_block();
  }

 private:
  // Which row this is, and how its keys were cut; false if the request has no such row, but for
  // the first, which says what was counted.
  __device__ __forceinline__ bool find(int index) {
    const int pair = index / plan_.rows;
    row_ = index % plan_.rows;
    request_ = pair / p_.kv_heads;
    head_ = pair % p_.kv_heads * group_ + row_ % group_;
    position_ = row_ / group_;
    const int positions = rows_of_request(p_, request_).count;
    first_slot_ = slot_of(plan_, p_.kv_heads, request_, pair % p_.kv_heads, 0);
    const Range tiles = visit(keys_of_request(p_.keys, request_).count, positions, p_.distances);
    tiles_ = tiles.end - tiles.begin;
    cut_ = cut_of(plan_, p_.batch * p_.kv_heads, tiles_);
    return position_ < max(1, positions);
  }

  __device__ __forceinline__ void add_in_warp() {
    Result total;
    if (cut_.result_splits == kGroupSplits) {
      for (int i = 0; i < cut_.results; i += kGroupSplits)
        add_results(i, min(kGroupSplits, cut_.results - i), i > 0, total);
    } else {
      for (int g = 0; g * kGroupSplits < cut_.results; ++g) add_group(g, group_of(g), total);
    }
    count_tiles();
    write(total);
  }

  __device__ __forceinline__ void add_in_block() {
    const int groups = ceil_div(cut_.splits, kGroupSplits);
    for (int g = warp_; g < groups; g += warps_) {
      const Result group = group_of(g);
      Shared& to = shared_[g];
      if (lane_ == 0) to.m = group.m, to.l = group.l, to.mass = group.mass;
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (exists(i)) to.o[element(i)] = group.o[i];
    }
    if (warp_ == warps_ - 1) count_tiles();
    __syncthreads();
    if (warp_ != 0) return;
    Result total;
    for (int g = 0; g < groups; ++g) {
      const Shared& from = shared_[g];
      Result group;
      group.m = from.m, group.l = from.l, group.mass = from.mass;
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (exists(i)) group.o[i] = from.o[element(i)];
      add_group(g, group, total);
    }
    write(total);
  }

  // The sums of a group's splits, which are one result or several.
  __device__ __forceinline__ Result group_of(int g) const {
    const int each = kGroupSplits / cut_.result_splits, first = g * each;
    Result group;
    add_results(first, min(each, cut_.results - first), false, group);
    return group;
  }

  __device__ __forceinline__ void add_group(int g, const Result& group, Result& total) const {
    if (g == 0)
      total = group;
    else
      total.add(group, log2_scale_);
  }

  // Adds `count` results, `more` to the total so far; all are asked for before one is used.
  __device__ __forceinline__ void add_results(int first, int count, bool more,
                                              Result& total) const {
    Result next[kGroupSplits];
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i)
      if (i < count) next[i] = load(first + i);
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i) {
      if (i >= count) break;
      if (i == 0 && !more)
        total = next[i];
      else
        total.add(next[i], log2_scale_);
    }
  }

  __device__ __forceinline__ int element(int i) const { return i / 2 * 64 + 2 * lane_ + i % 2; }
  __device__ __forceinline__ bool exists(int i) const {
    return kSlice % 64 == 0 || element(i) < kSlice;
  }

  __device__ __forceinline__ Result load(int index) const {
    const int64_t slot = first_slot_ + index * p_.kv_heads;
    const float* statistics = plan_.statistics + slot * kStatistics * plan_.rows + row_;
    const float* partial = plan_.partial + (slot * plan_.rows + row_) * kValueDim + slice_ * kSlice;
    Result result;
    result.m = statistics[0];
    result.l = statistics[plan_.rows];
    result.mass = {statistics[2 * plan_.rows], statistics[3 * plan_.rows]};
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      if (!exists(i)) continue;
      const float2 pair = *reinterpret_cast<const float2*>(partial + element(i));
      result.o[i] = pair.x, result.o[i + 1] = pair.y;
    }
    return result;
  }

  __device__ __forceinline__ void count_tiles() const {
    if (position_ != 0 || slice_ != 0) return;
    const int64_t cell = int64_t{request_} * p_.heads + head_;
    if (p_.report.visitable && lane_ == 0) p_.report.visitable[cell] = tiles_;
    if (!p_.report.skipped) return;
    int skipped = 0;
    for (int i = lane_; i < cut_.results; i += 32)
      skipped += plan_.dropped[first_slot_ + i * p_.kv_heads];
    skipped = __reduce_add_sync(kAllLanes, skipped);
    if (lane_ == 0) p_.report.skipped[cell] = skipped;
  }

  __device__ __forceinline__ void write(Result& total) const {
    const Span rows = rows_of_request(p_, request_);
    if (rows.count == 0) return;
    const TokenPlace first = first_query(p_, request_);
    T* out = static_cast<T*>(p_.out.data) + first.outer * p_.out.stride_request +
             (first.token + position_) * p_.out.stride_token + head_ * p_.out.stride_head +
             slice_ * kSlice;
    const int64_t cell = int64_t{head_} * p_.rows + rows.first + position_;
    const bool none = total.m == -INFINITY && total.l == 0;  // no valid key
    if (!none && p_.sinks) {
      Result sink;
      sink.m = p_.sinks[head_] / plan_.unit_scale;
      sink.l = 1;
      total.add(sink, log2_scale_);
    }
    const float inverse = none ? 0.0f : 1 / total.l;
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      if (!exists(i)) continue;
      const uint32_t pair = pack2<T>(total.o[i] * inverse, total.o[i + 1] * inverse);
      *reinterpret_cast<uint32_t*>(out + element(i)) = pair;
    }
    if (lane_ != 0 || slice_ != 0) return;
    if (p_.report.lse) {
      const float of_none = p_.sinks ? p_.sinks[head_] : -INFINITY;
      p_.report.lse[cell] = none ? of_none : total.m * plan_.unit_scale + logf(total.l);
    }
    if (p_.report.dropped_mass_bound)
      p_.report.dropped_mass_bound[cell] = total.mass.share(total.m * log2_scale_, total.l);
  }

  const Params& p_;
  const Plan& plan_;
  Shared* shared_;
  const int warps_, warp_, lane_, group_;
  const float log2_scale_;
  int request_, head_, position_;
  int row_;  // of the KV head
  int slice_;
  int tiles_;
  Cut cut_;
  int first_slot_;  // of the request and KV head's results
};

template <typename T, int kValueDim>
__global__ void __launch_bounds__(kMostCombineThreads)
    combine(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  extern __shared__ float groups[];
  using Shared = typename Combine<T, kValueDim>::Shared;
  Combine<T, kValueDim>(p, plan, reinterpret_cast<Shared*>(groups)).run();
}

}  // namespace blasst::cuda::decode
