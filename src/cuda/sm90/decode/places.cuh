// Where the tiles that a block scores lie in the tensors of keys and values, and their copies.
#pragma once

#include "cuda/core/decode/params.h"
#include "cuda/core/decode/steps.h"
#include "cuda/core/decode/work.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"

namespace blasst::cuda::decode {

inline constexpr int kMostBoxes = 4;  // pages of 16 tokens in a tile

struct alignas(8) TileInfo {
  int index, flags;
};

// A tile to score.
struct alignas(16) Tile : TileInfo {
  int boxes;  // copies; those wholly beyond the request's keys are left out
  int kv_head;
  int token;              // of each copy
  int outer[kMostBoxes];  // page or request
};

// One warp, all of it together, finds the tiles that an item scores, one after the other.
class Places {
 public:
  __device__ __forceinline__ Places(const Params& p, const Plan& plan)
      : p_(p), plan_(plan), boxes_(kTileKeys / plan.box_tokens), window_(32 / boxes_) {}

  __device__ __forceinline__ void begin(const Item& item) {
    steps_ = Steps(item.begin, item.end, item.split_tiles);
    found_ = 0;
  }
  __device__ __forceinline__ int count() const { return steps_.count(); }

  // Of the item that it began with.
  __device__ __forceinline__ Tile next(const Item& item) {
    const int of_window = found_ & (window_ - 1);  // a power of two
    if (of_window == 0) look_up(item);
    ++found_;
    const Step step = steps_.next();
    const int index = tile_of(item, step.position), key = index * kTileKeys;
    Tile tile{{index, step.flags}, 1, item.kv_head};
    if (p_.keys.page_table) {
      if (boxes_ > 1) tile.boxes = ceil_div(min(kTileKeys, item.keys - key), plan_.box_tokens);
      tile.token = key & (p_.keys.page_size - 1);
    } else {
      tile.token = item.first_key + key;
    }
#pragma unroll
    for (int box = 0; box < kMostBoxes; ++box)
      tile.outer[box] = __shfl_sync(kAllLanes, outer_, of_window * boxes_ + box);
    return tile;
  }

 private:
  __device__ __forceinline__ int tile_of(const Item& item, int position) const {
    return tile_at(p_.order, {item.tile_begin, item.tile_end}, position);
  }

  // Of the next steps, a box a lane: one read takes as long as many.
  __device__ __forceinline__ void look_up(const Item& item) {
    if (!p_.keys.page_table) {
      outer_ = p_.keys.cu_seqlens ? 0 : item.request;
      return;
    }
    const int lane = threadIdx.x % 32, step = min(found_ + lane / boxes_, count() - 1);
    const int token =
        tile_of(item, steps_.position(step)) * kTileKeys + lane % boxes_ * plan_.box_tokens;
    if (token < item.keys)
      outer_ =
          p_.keys.page_table[item.request * p_.keys.page_table_stride + token / p_.keys.page_size];
  }

  const Params& p_;
  const Plan& plan_;
  const int boxes_, window_;  // of a tile; steps that are looked up together
  Steps steps_;
  int found_ = 0;  // steps
  int outer_ = 0;  // of a box of the window
};

// Copies panels of a tile, `kCount` from `kFirst` on, of `Tensor`'s; one warp. A tile that lies in
// one piece is one copy, of lane 0; of smaller pages a lane copies one panel.
template <typename Tensor, int kFirst = 0, int kCount = Tensor::kCount>
__device__ __forceinline__ void copy_tile(const Plan& plan, const CUtensorMap* map,
                                          uint32_t destination, uint64_t& barrier, const Tile& tile,
                                          ptx::L2Hint hint) {
  const int lane = threadIdx.x % 32;
  if (lane == 0)
    ptx::mbarrier_arrive_expect(address(barrier),
                                tile.boxes * plan.box_tokens * kCount * Tensor::kRowBytes);
  __syncwarp();
  const bool whole = plan.box_tokens == kTileKeys;
  const int box = whole ? lane : lane / kCount, panel = kFirst + (whole ? 0 : lane % kCount);
  if (box >= tile.boxes) return;
  int outer = tile.outer[0];
#pragma unroll
  for (int i = 1; i < kMostBoxes; ++i)
    if (box == i) outer = tile.outer[i];
  ptx::copy_panels(
      destination + panel * Tensor::kPanelBytes + box * plan.box_tokens * Tensor::kRowBytes, map,
      address(barrier), tile.kv_head, tile.token, panel, outer, hint);
}

}  // namespace blasst::cuda::decode
