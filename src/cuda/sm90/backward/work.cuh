// Which gradients a block of threads finds, and what they depend on.
#pragma once

#include "cuda/core/backward/places.cuh"
#include "cuda/core/prefill/key_tiles.cuh"
#include "cuda/core/prefill/order.h"
#include "cuda/sm90/backward/layout.cuh"
#include "cuda/sm90/prefill/produce.cuh"

namespace blasst::cuda::backward {

// Blocks of threads: kKeys, one for each key tile of each KV head, the first keys, which causal
// rows see most often, first; before them, one for each query head and first key tile of a long
// request, which all of its rows may keep. kQueries, as in prefill. dims: of a key and its value.
template <Side kSide>
__device__ Work find_work(const Params& b, int index, int tile_keys, int dims) {
  const prefill::Params& p = b.forward;
  Work w{};
  if constexpr (kSide == Side::kKeys) {
    w.kv_head = index % p.kv_heads;
    const int group = p.heads / p.kv_heads;
    w.head = w.kv_head * group, w.heads = group;
    int place = index / p.kv_heads;
    if (place < b.sum_slots * group) {
      const int slot = place / group;
      w.request = request_of_slot(b, slot, tile_keys);
      if (w.request < 0) return w;
      w.head += place % group, w.heads = 1;
      w.sums = b.sums + (int64_t{slot} * p.heads + w.head) * tile_keys * dims;
      w.spans = spans_of(p, w.request);
      w.any = true;
      return w;
    }
    place -= b.sum_slots * group;
    if (p.keys.cu_seqlens) {
      const prefill::KeyTile at = prefill::key_tile_at(p.keys, p.batch, place, tile_keys);
      w.request = at.request, w.tile = at.tile;
    } else {
      w.request = place % p.batch, w.tile = place / p.batch;
    }
    w.spans = spans_of(p, w.request);
    w.any = w.tile * tile_keys < w.spans.keys.count &&
            !(w.tile == 0 && has_parts(b, w.spans.keys, tile_keys));
  } else {
    if (p.first_block && index >= p.heads * p.first_block[p.batch]) return w;
    const prefill::Item item =
        p.first_block
            ? prefill::item_of_list(index, p.first_block, p.batch, p.heads, p.section_heads)
            : prefill::item_at(index, p.batch, p.heads, p.row_blocks, p.section_heads);
    w.request = item.request, w.head = item.head;
    w.kv_head = item.head / (p.heads / p.kv_heads);
    w.tile = item.block * kWarpgroups;
    w.spans = spans_of(p, w.request);
    w.any = w.tile * kBlock < w.spans.rows.count;
  }
  return w;
}

// What stays with a warpgroup: position of its first row, or its first key.
template <typename L>
__device__ __forceinline__ int first_fixed(const Work& w, int warpgroup) {
  const int block = L::kByGradient ? 0 : warpgroup;
  return L::kSide == Side::kKeys ? w.tile * L::kTileKeys + block * kBlock
                                 : (w.tile + block) * kQueryTileRows + w.spans.offset;
}

using prefill::distances_of;

// Query tiles of a request with a row that sees one of the keys [first, end).
__device__ __forceinline__ Range tiles_that_see(const Work& w, Distances distances, int first,
                                                int end) {
  if (distances.least > distances.most) return {0, 0};
  const int begin_row = max(0, first + distances.least - w.spans.offset);
  const int end_row = min(w.spans.rows.count, end + distances.most - w.spans.offset);
  if (begin_row >= end_row) return {0, 0};
  return {begin_row / kQueryTileRows, ceil_div(end_row, kQueryTileRows)};
}

// Keys that a row of a query tile sees.
__device__ __forceinline__ Range keys_of_tile(const Work& w, Distances distances, int tile) {
  const int row = tile * kQueryTileRows;
  const int rows = min(kQueryTileRows, w.spans.rows.count - row);
  if (rows <= 0 || distances.least > distances.most) return {0, 0};
  const int first = row + w.spans.offset;
  const Range seen = keys_seen(first, first + rows - 1, distances, w.spans.keys.count);
  return seen.begin < seen.end ? seen : Range{0, 0};
}

}  // namespace blasst::cuda::backward
