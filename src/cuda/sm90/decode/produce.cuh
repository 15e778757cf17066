// The warps that feed a block: one finds the block's work, and streams queries and keys ahead of
// the warps that score them; the other brings the values that those ask for. Where there is no
// other, the first does so whenever it waits.
#pragma once

#include "cuda/core/decode/params.h"
#include "cuda/core/decode/queries.cuh"
#include "cuda/core/decode/turns.cuh"
#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/decode/layout.cuh"
#include "cuda/sm90/decode/places.cuh"

namespace blasst::cuda::decode {

// Brings the values of tiles that were asked for. One warp.
template <typename L>
class ValueProducer {
 public:
  __device__ __forceinline__ ValueProducer(const Plan& plan, typename L::Shared& shared,
                                           const CUtensorMap* v_map)
      : plan_(plan), shared_(shared), v_map_(v_map) {}

  // Until a tile of no boxes is asked for.
  __device__ __forceinline__ void run() {
    while (true) {
      ptx::mbarrier_wait(wanted(), ring_.phase);
      if (shared_.wanted[ring_.stage].boxes == 0) return;
      feed();
    }
  }

  // Those of now.
  __device__ __forceinline__ void feed_wanted() {
    while (was_wanted()) feed();
  }

 private:
  __device__ __forceinline__ uint32_t wanted() const {
    return address(shared_.values_wanted[ring_.stage]);
  }

  // Does not wait.
  __device__ __forceinline__ bool was_wanted() const {
    return __all_sync(kAllLanes, ptx::mbarrier_test(wanted(), ring_.phase));
  }

  __device__ __forceinline__ void feed() {
    const int stage = ring_.stage;
    const Tile tile = shared_.wanted[stage];  // by all lanes before the values can come
    copy_tile<typename L::Values>(plan_, v_map_, ptx::shared_address(shared_.values[stage]),
                                  shared_.values_full[stage], tile, ptx::L2Hint::kFirst);
    ring_.next();
  }

  const Plan& plan_;
  typename L::Shared& shared_;
  const CUtensorMap* v_map_;
  Ring<L::kValueStages> ring_;
};

template <typename L, int kRows, bool kTests>
class Producer {
  using Work = typename L::Work;
  static constexpr int kOwnRows = (kRows + 31) / 32;  // query rows a lane

 public:
  __device__ __forceinline__ Producer(const Params& p, const Plan& plan, typename L::Shared& shared,
                                      const CUtensorMap* q_map, const CUtensorMap* k_map,
                                      const CUtensorMap* v_map)
      : p_(p),
        plan_(plan),
        shared_(shared),
        q_map_(q_map),
        k_map_(k_map),
        items_(p, plan),
        lane_(threadIdx.x % 32),
        places_(p, plan),
        values_(plan, shared, v_map) {}

  // A block's first item has its number; later ones go to whoever comes first. The first is looked
  // for while the rest of the block gets ready.
  __device__ __forceinline__ void find_first() { found_ = items_.find(blockIdx.x, work_); }

  __device__ __forceinline__ void run() {
    while (found_) {
      if constexpr (L::kNarrowKeys) {
        work_.k_scale = scale_of(p_.k_scales, work_);
        work_.v_scale = scale_of(p_.v_scales, work_);
      }
      const int next = feed(work_);
      found_ =
          plan_.turns.signature && items_.find(gridDim.x + __shfl_sync(kAllLanes, next, 0), work_);
    }
    wait(shared_.keys_empty[ring_.stage], ring_.phase ^ 1);
    if (lane_ == 0) {
      shared_.tiles[ring_.stage].flags = kStop;
      ptx::mbarrier_arrive(address(shared_.tiles_full[ring_.stage]));
    }
    if constexpr (!L::kFeedsValues) values_.run();
  }

 private:
  // Values are brought meanwhile, unless another warp does.
  __device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) {
    if constexpr (L::kFeedsValues) {
      ptx::mbarrier_wait(address(barrier), parity);
    } else {
      constexpr uint32_t kSleep = 64;  // ns: what asks for values waits as long
      do {
        values_.feed_wanted();
      } while (!__all_sync(kAllLanes, ptx::mbarrier_try_wait(address(barrier), parity, kSleep)));
    }
  }

  static __device__ __forceinline__ float scale_of(const Scales& scales, const Item& item) {
    if (!scales.values) return 1;
    return scales.values[item.request * scales.stride_request + item.kv_head * scales.stride_head];
  }

  // Returns, to lane 0, the block's next turn.
  __device__ __forceinline__ int feed(const Work& item) {
    float thresholds[kOwnRows] = {};
    if constexpr (kTests) ask_for_thresholds(item, thresholds);
    feed_queries(item);
    places_.begin(item);
    const int count = places_.count();
    int next = 0;
    for (int i = 0; i < count; ++i) {
      feed_keys(places_.next(item));
      // Keys come first: the ring has room for these whether or not the item has begun.
      if (i == min(count, L::kKeyStages) - 1) {
        if constexpr (kTests) feed_thresholds(item, thresholds);
        queries_.next();
      }
      // Where nobody waits for it.
      if (i == count / 2 && lane_ == 0 && plan_.turns.signature) next = turn_.take(plan_.turns);
    }
    return next;
  }

  // As many positions as any request may have.
  __device__ __forceinline__ void feed_queries(const Work& item) {
    const TokenPlace first = first_query(p_, item.request);
    const int slot = queries_.stage;
    wait(shared_.queries_empty[slot], queries_.phase ^ 1);
    if (lane_ == 0) {
      shared_.items[slot] = item;
      ptx::mbarrier_arrive_expect(address(shared_.queries_full[slot]),
                                  plan_.rows * L::Queries::kCount * kPanelRowBytes);
    }
    __syncwarp();
    if (lane_ < L::Queries::kCount) {
      ptx::copy_box(ptx::shared_address(shared_.queries[slot]) + lane_ * L::Queries::kPanelBytes,
                    q_map_, address(shared_.queries_full[slot]), lane_ * kPanel,
                    item.kv_head * (p_.heads / p_.kv_heads), first.token, first.outer,
                    ptx::L2Hint::kNormal);
    }
  }

  // Before the copies that would go ahead of it to memory.
  __device__ __forceinline__ void ask_for_thresholds(const Item& item,
                                                     float (&values)[kOwnRows]) const {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int row = lane_ + 32 * i;
      if (row < plan_.rows) values[i] = threshold_of(p_, item, row);
    }
  }

  __device__ __forceinline__ void feed_thresholds(const Item& item,
                                                  const float (&values)[kOwnRows]) {
    const int slot = queries_.stage;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int row = lane_ + 32 * i;
      if (row < kRows) shared_.below[slot][row] = skip_limit(p_, plan_, item, row, values[i]);
    }
    ptx::mbarrier_arrive(address(shared_.below_full[slot]));
  }

  __device__ __forceinline__ void feed_keys(const Tile& tile) {
    const int stage = ring_.stage;
    wait(shared_.keys_empty[stage], ring_.phase ^ 1);
    if (lane_ == 0) {
      shared_.tiles[stage] = tile;
      ptx::mbarrier_arrive(address(shared_.tiles_full[stage]));
    }
    copy_tile<typename L::Keys>(plan_, k_map_, ptx::shared_address(shared_.keys[stage]),
                                shared_.keys_full[stage], tile,
                                tile.flags & kSeed ? ptx::L2Hint::kNormal : ptx::L2Hint::kFirst);
    ring_.next();
  }

  const Params& p_;
  const Plan& plan_;
  typename L::Shared& shared_;
  const CUtensorMap *q_map_, *k_map_;
  Items items_;
  Work work_;  // at hand, if one was found
  bool found_ = false;
  const int lane_;
  Places places_;
  Turn turn_;
  ValueProducer<L> values_;
  Ring<L::kKeyStages> ring_;
  Ring<2> queries_;
};

}  // namespace blasst::cuda::decode
