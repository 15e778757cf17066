// The warp that feeds a block: it finds the block's work, and streams queries and latents.
#pragma once

#include "cuda/core/decode/queries.cuh"
#include "cuda/core/decode/turns.cuh"
#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/tile_test.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/decode/latent/layout.cuh"
#include "cuda/sm90/decode/produce.cuh"

namespace blasst::cuda::decode::latent {

template <typename C>
class Producer {
 public:
  __device__ __forceinline__ Producer(const Params& p, const Plan& plan, Shared& shared,
                                      const CUtensorMap* q_map, const CUtensorMap* k_map)
      : p_(p), plan_(plan), shared_(shared), q_map_(q_map), k_map_(k_map) {}

  // A block's first item has its number; later ones go to whoever comes first.
  __device__ __forceinline__ void run() {
    Items items(p_, plan_);
    Item item;
    for (int index = blockIdx.x; items.find(index, item);) {
      int next = 0;
      if (lane_ == 0 && plan_.turns.signature) next = gridDim.x + take_turn(plan_.turns);
      feed(item);
      if (!plan_.turns.signature) break;
      index = __shfl_sync(kAllLanes, next, 0);
    }
    ptx::mbarrier_wait(address(shared_.empty[ring_.stage][kRotary]), ring_.phase ^ 1);
    if (lane_ == 0) {
      shared_.tiles[ring_.stage].flags = kStop;
      ptx::mbarrier_arrive(address(shared_.full[ring_.stage][kRotary]));
    }
  }

 private:
  __device__ __forceinline__ void feed(const Item& item) {
    feed_queries(item);
    const Range visit{item.tile_begin, item.tile_end};
    for (int i = 0; i < steps_of(item); ++i) {
      const Step step = step_of(item, i);
      feed_tile(item, tile_at(p_.order, visit, step.position), step.flags);
    }
  }

  // As many positions as any request may have.
  __device__ __forceinline__ void feed_queries(const Item& item) {
    const TokenPlace first = first_query(p_, item.request);
    ptx::mbarrier_wait(address(shared_.queries_empty), queries_phase_ ^ 1);
    queries_phase_ ^= 1;
    if constexpr (C::kTests) {
      for (int row = lane_; row < kMostRows; row += 32) {
        const float threshold = row < plan_.rows ? threshold_of(p_, item, row) : 0;
        shared_.below[row] = skip_limit(p_, plan_, item, row, threshold);
      }
    }
    __syncwarp();
    if (lane_ == 0) {
      shared_.item = item;
      ptx::mbarrier_arrive_expect(address(shared_.queries_full),
                                  plan_.rows * Queries::kCount * kPanelRowBytes);
    }
    __syncwarp();
    if (lane_ < Queries::kCount) {
      ptx::copy_box(ptx::shared_address(shared_.queries) + lane_ * Queries::kPanelBytes, q_map_,
                    address(shared_.queries_full), lane_ * kPanel,
                    item.kv_head * (p_.heads / p_.kv_heads), first.token, first.outer,
                    ptx::L2Hint::kNormal);
    }
  }

  __device__ __forceinline__ void feed_tile(const Item& item, int tile, int flags) {
    const int boxes = boxes_of(p_, plan_, item.keys, tile);
    int page = 0;
    if (p_.keys.page_table && lane_ < boxes) {
      const int index = (tile * kTileKeys + lane_ * plan_.box_tokens) / p_.keys.page_size;
      page = p_.keys.page_table[item.request * p_.keys.page_table_stride + index];
    }
    // Other blocks read what several parts of the heads share, or what is a seed, about now.
    const bool shared = p_.kv_heads > 1 || flags & kSeed;
    const ptx::L2Hint hint = shared ? ptx::L2Hint::kNormal : ptx::L2Hint::kFirst;
    const int stage = ring_.stage;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const auto piece = static_cast<Piece>(i);
      const uint32_t full = address(shared_.full[stage][piece]);
      ptx::mbarrier_wait(address(shared_.empty[stage][piece]), ring_.phase ^ 1);
      if (lane_ == 0) {
        if (piece == kRotary) shared_.tiles[stage] = {tile, flags};
        ptx::mbarrier_arrive_expect(full,
                                    boxes * plan_.box_tokens * panels(piece) * kPanelRowBytes);
      }
      __syncwarp();
      const int box = lane_ / panels(piece), panel = first_panel(piece) + lane_ % panels(piece);
      const int of_box = __shfl_sync(kAllLanes, page, box);
      if (box >= boxes) continue;
      const int token = tile * kTileKeys + box * plan_.box_tokens;
      const TokenPlace place = place_of_token(p_.keys, item.request, item.first_key, token, of_box);
      ptx::copy_box(ptx::shared_address(shared_.latents[stage]) + panel * Latents::kPanelBytes +
                        box * plan_.box_tokens * kPanelRowBytes,
                    k_map_, full, panel * kPanel, 0, place.token, place.outer, hint);
    }
    ring_.next();
  }

  const Params& p_;
  const Plan& plan_;
  Shared& shared_;
  const CUtensorMap *q_map_, *k_map_;
  const int lane_ = threadIdx.x % 32;
  Ring<kStages> ring_;
  uint32_t queries_phase_ = 0;
};

}  // namespace blasst::cuda::decode::latent
