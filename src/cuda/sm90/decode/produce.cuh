// The warp that feeds a block: it finds the block's work, and streams queries and keys ahead of the
// warps that score them.
#pragma once

#include <cmath>

#include "blasst/blasst.h"
#include "cuda/core/decode/params.h"
#include "cuda/core/decode/queries.cuh"
#include "cuda/core/decode/splits.h"
#include "cuda/core/decode/turns.cuh"
#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/decode/layout.cuh"

namespace blasst::cuda::decode {

// Copies of a tile: pages, or one box. Those wholly beyond the request's keys are left out.
__device__ __forceinline__ int boxes_of(const Params& p, const Plan& plan, int keys, int tile) {
  if (!p.keys.page_table) return 1;
  const int left = min(kTileKeys, keys - tile * kTileKeys);
  return ceil_div(left, plan.box_tokens);
}

// Copies a tile's keys or values, of `Tile`'s panels and elements of so many bytes; one warp, whose
// lane copies a panel of box lane / Tile::kCount, from that box's `page`.
template <typename Tile, int kElementBytes>
__device__ __forceinline__ void copy_tile(const Params& p, const Plan& plan, const CUtensorMap* map,
                                          uint32_t destination, uint64_t& barrier, const Item& item,
                                          int tile, int boxes, int page, ptx::L2Hint hint) {
  const int lane = threadIdx.x % 32;
  const int box = lane / Tile::kCount, panel = lane % Tile::kCount;
  if (lane == 0)
    ptx::mbarrier_arrive_expect(address(barrier),
                                boxes * plan.box_tokens * Tile::kCount * Tile::kRowBytes);
  __syncwarp();
  if (box >= boxes) return;
  const int token = tile * kTileKeys + box * plan.box_tokens;
  const TokenPlace place = place_of_token(p.keys, item.request, item.first_key, token, page);
  ptx::copy_box(destination + panel * Tile::kPanelBytes + box * plan.box_tokens * Tile::kRowBytes,
                map, address(barrier), panel * Tile::kRowBytes / kElementBytes, item.kv_head,
                place.token, place.outer, hint);
}

template <typename L, int kRows, bool kTests>
class Producer {
  using Work = typename L::Work;
  static constexpr int kOwnRows = (kRows + 31) / 32;  // query rows a lane

 public:
  __device__ __forceinline__ Producer(const Params& p, const Plan& plan, typename L::Shared& shared,
                                      const CUtensorMap* q_map, const CUtensorMap* k_map)
      : p_(p),
        plan_(plan),
        shared_(shared),
        q_map_(q_map),
        k_map_(k_map),
        lane_(threadIdx.x % 32) {}

  // A block's first item has its number; later ones go to whoever comes first.
  __device__ __forceinline__ void run() {
    Items items(p_, plan_);
    Work work;
    for (int index = blockIdx.x; items.find(index, work);) {
      int next = 0;
      if (lane_ == 0 && plan_.turns.signature) next = gridDim.x + take_turn(plan_.turns);
      if constexpr (L::kNarrowKeys) {
        work.k_scale = scale_of(p_.k_scales, work);
        work.v_scale = scale_of(p_.v_scales, work);
      }
      feed(work);
      if (!plan_.turns.signature) break;
      index = __shfl_sync(kAllLanes, next, 0);
    }
    ptx::mbarrier_wait(address(shared_.keys_empty[ring_.stage]), ring_.phase ^ 1);
    if (lane_ == 0) {
      shared_.tiles[ring_.stage].flags = kStop;
      ptx::mbarrier_arrive(address(shared_.tiles_full[ring_.stage]));
    }
  }

 private:
  static __device__ __forceinline__ float scale_of(const Scales& scales, const Item& item) {
    if (!scales.values) return 1;
    return scales.values[item.request * scales.stride_request + item.kv_head * scales.stride_head];
  }

  __device__ __forceinline__ void feed(const Work& item) {
    float thresholds[kOwnRows] = {};
    if constexpr (kTests) ask_for_thresholds(item, thresholds);
    feed_queries(item);
    const Range visit{item.tile_begin, item.tile_end};
    const int count = steps_of(item);
    for (int i = 0; i < count; ++i) {
      const Step step = step_of(item, i);
      feed_keys(item, tile_at(p_.order, visit, step.position), step.flags);
      // Keys come first: the ring has room for these whether or not the item has begun.
      if (kTests && i == min(count, L::kKeyStages) - 1) feed_thresholds(item, thresholds);
    }
  }

  // As many positions as any request may have.
  __device__ __forceinline__ void feed_queries(const Work& item) {
    const TokenPlace first = first_query(p_, item.request);
    const int slot = queries_.stage;
    ptx::mbarrier_wait(address(shared_.queries_empty[slot]), queries_.phase ^ 1);
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
    if constexpr (!kTests) queries_.next();
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
    ptx::mbarrier_arrive(address(shared_.queries_full[slot]));
    queries_.next();
  }

  __device__ __forceinline__ void feed_keys(const Item& item, int tile, int flags) {
    const int boxes = boxes_of(p_, plan_, item.keys, tile);
    Tile here{.index = tile, .flags = flags};
    int page = 0;
    if (p_.keys.page_table) {
      const int mine = lane_ < boxes ? page_of(item, tile) : 0;
#pragma unroll
      for (int box = 0; box < kMostBoxes; ++box)
        here.pages[box] = __shfl_sync(kAllLanes, mine, box);
      page = __shfl_sync(kAllLanes, mine, lane_ / L::Keys::kCount);
    }
    const int stage = ring_.stage;
    ptx::mbarrier_wait(address(shared_.keys_empty[stage]), ring_.phase ^ 1);
    if (lane_ == 0) {
      shared_.tiles[stage] = here;
      ptx::mbarrier_arrive(address(shared_.tiles_full[stage]));
    }
    __syncwarp();
    copy_tile<typename L::Keys, L::kNarrowKeys ? 1 : 2>(
        p_, plan_, k_map_, ptx::shared_address(shared_.keys[stage]), shared_.keys_full[stage], item,
        tile, boxes, page, flags & kSeed ? ptx::L2Hint::kNormal : ptx::L2Hint::kFirst);
    ring_.next();
  }

  __device__ __forceinline__ int page_of(const Item& item, int tile) {
    const int index = (tile * kTileKeys + lane_ * plan_.box_tokens) / p_.keys.page_size;
    return p_.keys.page_table[item.request * p_.keys.page_table_stride + index];
  }

  const Params& p_;
  const Plan& plan_;
  typename L::Shared& shared_;
  const CUtensorMap *q_map_, *k_map_;
  int lane_;
  Ring<L::kKeyStages> ring_;
  Ring<2> queries_;
};

}  // namespace blasst::cuda::decode
