// The producer warpgroup: work, queries, keys and values into shared memory.
#pragma once

#include "cuda/core/keys.cuh"
#include "cuda/core/prefill/key_tiles.cuh"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/prefill/work.cuh"
#include "cuda/core/tensor.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/prefill/config.cuh"

namespace blasst::cuda::prefill {

// Starts the copy of one key or value tile, of `Tile`'s panels from `first_panel` on. Rows past the
// last page or the tensor become zero.
template <typename Tile, int kKeys>
__device__ void copy_tile(const KeyLayout& keys, const KeySource& source, const CUtensorMap* map,
                          uint32_t destination, uint32_t barrier, int tile, int first_panel = 0) {
  const auto copy_rows = [&](int row, int token, int outer) {
#pragma unroll
    for (int panel = 0; panel < Tile::kCount; ++panel) {
      ptx::copy_box(destination + panel * Tile::kPanelBytes + row * kPanelRowBytes, map, barrier,
                    (first_panel + panel) * kPanel, token, source.kv_head, outer,
                    ptx::L2Hint::kLast);
    }
  };
  ptx::mbarrier_arrive_expect(barrier, Tile::kBytes);
  // On its own, as short as can be: a kept tile's values wait for it.
  if (!source.pages) return copy_rows(0, source.first_token + tile * kKeys, source.outer);
  const int box = min(keys.page_size, kKeys);
  for (int row = 0; row < kKeys; row += box) {
    const int token = tile * kKeys + row, page = token / keys.page_size;
    const int id = page < source.page_count ? source.pages[page] : keys.pages;
    copy_rows(row, token % keys.page_size, id);
  }
}

// Starts the copy of one tile of keys in bytes, and of its unit. place: among the tiles of all
// requests.
template <typename C>
__device__ void copy_quantized_tile(const Params& p, typename C::Shared& s, const CUtensorMap* map,
                                    int stage, int kv_head, int place) {
  using Keys = typename C::Layout::Keys;
  const uint32_t barrier = address(s.barriers.key_full[stage][0]);
  ptx::mbarrier_arrive_expect(barrier, Keys::kBytes + sizeof(KeyTileUnit));
#pragma unroll
  for (int panel = 0; panel < Keys::kCount; ++panel) {
    ptx::copy_box(ptx::shared_address(s.key[stage]) + panel * Keys::kPanelBytes, map, barrier,
                  panel * Keys::kRowBytes, place * C::kKeys, kv_head, 0, ptx::L2Hint::kLast);
  }
  ptx::copy_bytes(ptx::shared_address(&s.unit[stage]),
                  p.quantized.units + int64_t{kv_head} * p.quantized.tiles + place,
                  sizeof(KeyTileUnit), barrier);
}

// Starts the copies of the block's queries.
template <typename C>
__device__ void copy_queries(const Params& p, typename C::Shared& s, const CUtensorMap* map,
                             const Work& w) {
  using L = typename C::Layout;
  const uint32_t full = address(s.barriers.query_full);
  ptx::mbarrier_arrive_expect(full, L::kWarpgroups * L::Queries::kBytes);
  const int row = row_in_tensor(p, w.request, w.output_row);
  const int outer = p.cu_seqlens_q ? 0 : w.request;
  for (int wg = 0; wg < L::kWarpgroups; ++wg) {
    for (int panel = 0; panel < L::Queries::kCount; ++panel) {
      ptx::copy_box(ptx::shared_address(s.query[wg]) + panel * L::Queries::kPanelBytes, map, full,
                    panel * kPanel, row + wg * kQueryTileRows, w.head, outer, ptx::L2Hint::kFirst);
    }
  }
}

// Hands out work, loads queries and keys. One thread.
template <typename C>
__device__ void produce_keys(const Params& p, typename C::Shared& s, const CUtensorMap* query_map,
                             const CUtensorMap* key_map) {
  using L = typename C::Layout;
  auto& b = s.barriers;
  Ring<L::kKeyStages> keys;
  Ring<L::kMostAhead> settled;
  Ring<2> works;
  uint32_t query_phase = 0;
  const int items = p.heads * (p.first_block ? p.first_block[p.batch] : p.batch * p.row_blocks);
  bool more = true;
  for (int index = blockIdx.x; more;) {
    // 1. The next item; the one after it is asked for, its number comes while this one is copied.
    more = index < items;
    Work w{};
    if (more) {
      w = describe<C>(p, p.first_block
                             ? item_of_list(index, p.first_block, p.batch, p.heads, p.section_heads)
                             : item_at(index, p.batch, p.heads, p.row_blocks, p.section_heads));
      index = gridDim.x + atomicAdd(p.next_item, 1);
    }
    // 2. Everyone learns of it, or of the end: no rows.
    ptx::mbarrier_wait(address(b.work_empty[works.stage]), works.phase ^ 1);
    s.work[works.stage] = w;
    ptx::mbarrier_arrive(address(b.work_full[works.stage]));
    works.next();

    const Range tiles = {w.tile_begin, w.tile_end};
    if (tiles.begin >= tiles.end) continue;
    const KeySource source(p, w);
    const int first_tile = C::kInt8 ? first_key_tile(p.keys, w.request, C::kKeys) : 0;
    for (int i = 0; i < tiles.end - tiles.begin; ++i) {
      // 3. Keys, as far ahead as there are stages, and as the values' producers allow.
      if constexpr (C::kTests) {
        ptx::mbarrier_wait(address(b.settled[settled.stage]), settled.phase ^ 1);
        settled.next();
      }
      const int tile = tile_at(p.order, tiles, i);
#pragma unroll
      for (int part = 0; part < L::kKeyParts; ++part) {
        ptx::mbarrier_wait(address(b.key_empty[keys.stage][part]), keys.phase ^ 1);
        if constexpr (C::kInt8)
          copy_quantized_tile<C>(p, s, key_map, keys.stage, source.kv_head, first_tile + tile);
        else
          copy_tile<typename L::KeyPart, C::kKeys>(
              p.keys, source, key_map,
              ptx::shared_address(s.key[keys.stage]) + part * L::KeyPart::kBytes,
              address(b.key_full[keys.stage][part]), tile, part * L::KeyPart::kCount);
      }
      keys.next();
      // 4. The first scores need queries, too; the previous item's are free about now.
      if (i > 0) continue;
      ptx::mbarrier_wait(address(b.query_empty), query_phase ^ 1);
      query_phase ^= 1;
      copy_queries<C>(p, s, query_map, w);
    }
  }
}

// Waits until tile `visit` of this stage is wanted by a warpgroup (true) or by none (false). A
// warpgroup that has decided on a later tile of the stage without waiting for this one skipped it.
// No barrier completes at whichever of the two comes first, so this polls, gently.
template <int kWarpgroups>
__device__ __forceinline__ bool wanted(const int (&decision)[kWarpgroups], int visit) {
  for (;;) {
    bool all = true;
#pragma unroll
    for (int wg = 0; wg < kWarpgroups; ++wg) {
      const int newest = ptx::poll_shared(ptx::shared_address(&decision[wg]));
      if (newest == 2 * visit + 1) return true;
      all = all && newest >= 2 * visit;
    }
    if (all) return false;
    __nanosleep(32);
  }
}

// Loads the values of every kValueStages-th visited tile. One thread for each stage.
template <typename C>
__device__ void produce_values(const Params& p, typename C::Shared& s, const CUtensorMap* value_map,
                               int stage) {
  using L = typename C::Layout;
  auto& b = s.barriers;
  Ring<2> works;
  int before = 0;  // tiles visited before this item
  // Where tiles are kept one after the other, the next is loaded before it is asked for.
  int kept_in_a_row = 0;
  for (;;) {
    // 1. The work, and which of its visits are this stage's.
    const Work w = take_work(s, works);
    if (w.rows == 0) return;
    const KeySource source(p, w);
    const Range tiles = {w.tile_begin, w.tile_end};
    const int end = before + tiles.end - tiles.begin;
    int visit = before + (stage - before % L::kValueStages + L::kValueStages) % L::kValueStages;
    for (; visit < end; visit += L::kValueStages) {
      const uint32_t full = address(b.value_full[visit % L::kValueBarriers]);
      const auto load = [&] {
        copy_tile<typename L::Values, C::kKeys>(p.keys, source, value_map,
                                                ptx::shared_address(s.value[stage]), full,
                                                tile_at(p.order, tiles, visit - before));
      };
      // 2. The stage's last values have been used, or their tile was skipped.
      const int previous = visit - L::kValueStages;
      if (previous >= 0) {
        ptx::mbarrier_wait(address(b.value_done[previous % L::kValueBarriers]),
                           previous / L::kValueBarriers & 1);
      }
      // 3. Values, once a warpgroup has kept the tile.
      if constexpr (!C::kTests) {
        load();
      } else {
        const bool early = kept_in_a_row >= 2;
        if (early) load();
        const bool keep = wanted(s.decision[stage], visit);
        kept_in_a_row = keep ? kept_in_a_row + 1 : 0;
        if (!early) keep ? load() : ptx::mbarrier_arrive(full);
        // Someone must see every phase end; nobody else does where nobody keeps the tile.
        if (!keep) ptx::mbarrier_wait(full, visit / L::kValueBarriers & 1);
        // 4. No warpgroup gets more than kMostAhead tiles ahead of this one.
        ptx::mbarrier_arrive(address(b.settled[visit % L::kMostAhead]));
      }
    }
    before = end;
  }
}

}  // namespace blasst::cuda::prefill
