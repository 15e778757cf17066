// Work of a block: splits of one request and KV head.
#pragma once

#include <cmath>

#include "blasst/blasst.h"
#include "cuda/core/decode/params.h"
#include "cuda/core/decode/queries.cuh"
#include "cuda/core/decode/splits.h"
#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::decode {

// One split, or several.
struct Item {
  int request, kv_head;
  int slot;                  // of its next result
  int positions;             // of the request
  int keys;                  // of the request
  int first_key;             // where the request begins in the tensor
  int tile_begin, tile_end;  // of the whole visit
  int split_tiles;
  int result_splits;
  int begin, end;  // positions in the visit
};

// The items of a launch in order: those of a request stand side by side, and its KV heads beside
// each other, since blocks that run together then read neighbouring rows of memory together. First
// come the whole items of all requests, then what is left of each, so that the blocks end together.
// Short requests lack some, and have no number for them. One warp, all of it together: a lane knows
// a request, of 32 at a time.
class Items {
 public:
  __device__ __forceinline__ Items(const Params& p, const Plan& plan) : p_(p), plan_(plan) {}

  // The index-th item; false if there are fewer. Indices grow from call to call.
  __device__ __forceinline__ bool find(int index, Item& item) {
    while (index >= end_) {
      if (next_request_ >= p_.batch) {
        if (at_rest_ || p_.batch == 0) return false;
        at_rest_ = true;
        next_request_ = 0;
      }
      look_at_next();
    }
    const int lane = __popc(__ballot_sync(kAllLanes, through_ <= index));
    const auto of_lane = [&](int x) { return __shfl_sync(kAllLanes, x, lane); };
    item.request = of_lane(mine_.request);
    item.positions = of_lane(mine_.positions);
    item.keys = of_lane(mine_.keys);
    item.first_key = of_lane(mine_.first_key);
    item.tile_begin = of_lane(mine_.tile_begin), item.tile_end = of_lane(mine_.tile_end);
    item.split_tiles = of_lane(mine_.split_tiles);
    item.result_splits = of_lane(mine_.result_splits);
    const int splits = of_lane(item_splits_), of_request = index - of_lane(first_);
    item.kv_head = of_request % p_.kv_heads;
    const int first_split = of_lane(before_) + of_request / p_.kv_heads * splits;
    item.slot =
        slot_of(plan_, p_.kv_heads, item.request, item.kv_head, first_split / item.result_splits);
    const Range own =
        tiles_of_splits(first_split, splits, item.tile_end - item.tile_begin, item.split_tiles);
    item.begin = own.begin, item.end = own.end;
    return true;
  }

 private:
  __device__ __forceinline__ void look_at_next() {
    const int lane = threadIdx.x % 32;
    mine_.request = next_request_ + lane;
    int items = 0;
    if (mine_.request < p_.batch) {
      mine_.positions = rows_of_request(p_, mine_.request).count;
      const Span keys = keys_of_request(p_.keys, mine_.request);
      mine_.keys = keys.count, mine_.first_key = keys.first;
      const Range tiles = visit(keys.count, mine_.positions, p_.distances);
      mine_.tile_begin = tiles.begin, mine_.tile_end = tiles.end;
      const Cut cut = cut_of(plan_, p_.batch * p_.kv_heads, tiles.end - tiles.begin);
      mine_.split_tiles = cut.split_tiles;
      mine_.result_splits = cut.result_splits;
      item_splits_ = cut.item_splits;
      before_ = at_rest_ ? cut.items * cut.item_splits : 0;
      items = p_.kv_heads * (at_rest_ ? before_ < cut.splits : cut.items);
    }
    through_ = end_ + items;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, through_ - end_, step);
      if (lane >= step) through_ += before;
    }
    first_ = through_ - items;
    end_ = __shfl_sync(kAllLanes, through_, 31);
    next_request_ += 32;
  }

  const Params& p_;
  const Plan& plan_;
  bool at_rest_ = false;  // behind the whole items
  int next_request_ = 0;
  int end_ = 0;  // index behind the items of the requests that were looked at
  // A lane's request: the indices of its first item and behind its last.
  int first_ = 0, through_ = 0;
  int item_splits_ = 1;
  int before_ = 0;  // splits of the request, before its first item here
  Item mine_{};
};

// Query rows of the item; group: query heads of a KV head.
__device__ __forceinline__ int rows_of(const Item& item, int group) {
  return item.positions * group;
}

// The keys that a row of the item sees.
__device__ __forceinline__ Range range_of(const Params& p, const Item& item, int group, int row) {
  const int position = item.keys - item.positions + row / group;
  return keys_seen(position, position, p.distances, item.keys);
}

// The threshold of a row; 0 without a test.
__device__ __forceinline__ float threshold_of(const Params& p, const Item& item, int row) {
  if (p.test.kind == BLASST_TEST_NONE) return 0;
  const int group = p.heads / p.kv_heads;
  const int head = item.kv_head * group + row % group;
  return p.test.values[item.request * p.test.stride_request + head * p.test.stride_head];
}

// What the tested value of a row must stay below for a skip, as scores are kept.
__device__ __forceinline__ float skip_limit(const Params& p, const Plan& plan, const Item& item,
                                            int row, float threshold) {
  if (row >= rows_of(item, p.heads / p.kv_heads)) return INFINITY;  // no row: allows every skip
  return log_threshold(p.test.kind, threshold, item.keys) / plan.unit_scale;
}

}  // namespace blasst::cuda::decode
