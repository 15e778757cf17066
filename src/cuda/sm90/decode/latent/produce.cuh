// The warp that feeds a block: it finds the block's work, and streams queries and latents.
#pragma once

#include "cuda/core/decode/queries.cuh"
#include "cuda/core/decode/turns.cuh"
#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/decode/latent/layout.cuh"
#include "cuda/sm90/decode/places.cuh"

namespace blasst::cuda::decode::latent {

template <typename C>
class Producer {
 public:
  __device__ __forceinline__ Producer(const Params& p, const Plan& plan, Shared& shared,
                                      const CUtensorMap* q_map, const CUtensorMap* k_map,
                                      const CUtensorMap* rotary_map)
      : p_(p),
        plan_(plan),
        shared_(shared),
        q_map_(q_map),
        k_map_(k_map),
        rotary_map_(rotary_map),
        items_(p, plan),
        places_(p, plan) {}

  // A block's first item has its number; later ones go to whoever comes first. The first is looked
  // for while the rest of the block gets ready.
  __device__ __forceinline__ void find_first() { found_ = items_.find(blockIdx.x, item_); }

  __device__ __forceinline__ void run() {
    while (found_) {
      const int next = feed();
      found_ =
          plan_.turns.signature && items_.find(gridDim.x + __shfl_sync(kAllLanes, next, 0), item_);
    }
    ptx::mbarrier_wait(address(shared_.empty[ring_.stage][kRotary]), ring_.phase ^ 1);
    if (lane_ == 0) {
      shared_.tiles[ring_.stage].flags = kStop;
      ptx::mbarrier_arrive(address(shared_.full[ring_.stage][kRotary]));
    }
  }

 private:
  // Returns, to lane 0, the block's next turn.
  __device__ __forceinline__ int feed() {
    feed_queries(item_);
    places_.begin(item_);
    const int count = places_.count();
    int next = 0;
    Tile tile = find();
    for (int i = 0; i < count; ++i) {
      // While the tile's rotary piece is all that there is room for.
      feed_piece<kRotary>(rotary_map_, tile);
      const Tile following = i + 1 < count ? find() : tile;
      feed_piece<kLeft>(k_map_, tile);
      feed_piece<kRight>(k_map_, tile);
      ring_.next();
      tile = following;
      // Where nobody waits for it.
      if (i == count / 2 && lane_ == 0 && plan_.turns.signature) next = turn_.take(plan_.turns);
    }
    return next;
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

  __device__ __forceinline__ Tile find() {
    Tile tile = places_.next(item_);
    tile.kv_head = 0;  // of all parts of the query heads
    return tile;
  }

  template <Piece kPiece>
  __device__ __forceinline__ void feed_piece(const CUtensorMap* map, const Tile& tile) {
    // Other blocks read what several parts of the heads share, or what is a seed, about now.
    const bool shared = p_.kv_heads > 1 || tile.flags & kSeed;
    const int stage = ring_.stage;
    ptx::mbarrier_wait(address(shared_.empty[stage][kPiece]), ring_.phase ^ 1);
    if (kPiece == kRotary && lane_ == 0) shared_.tiles[stage] = {tile.index, tile.flags};
    copy_tile<Latents, first_panel(kPiece), panels(kPiece)>(
        plan_, map, ptx::shared_address(shared_.latents[stage]), shared_.full[stage][kPiece], tile,
        shared ? ptx::L2Hint::kNormal : ptx::L2Hint::kFirst);
  }

  const Params& p_;
  const Plan& plan_;
  Shared& shared_;
  const CUtensorMap *q_map_, *k_map_, *rotary_map_;
  Items items_;
  Item item_;  // at hand, if one was found
  bool found_ = false;
  Places places_;
  Turn turn_;
  const int lane_ = threadIdx.x % 32;
  Ring<kStages> ring_;
  uint32_t queries_phase_ = 0;
};

}  // namespace blasst::cuda::decode::latent
