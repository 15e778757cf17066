// The producer warpgroup: work, queries, keys and values into shared memory.
#pragma once

#include "cuda/core/keys.cuh"
#include "cuda/core/prefill/key_tiles.cuh"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/tensor.h"
#include "cuda/core/tile_test.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/prefill/config.cuh"

namespace blasst::cuda::prefill {

// What the test compares with, for the query tile of a warpgroup: of a tile's largest score, or
// (relative tests) of its distance to the running maximum.
__device__ __forceinline__ float threshold_of(const Params& p, const Work& w, int warpgroup) {
  if (p.test.kind == BLASST_TEST_NONE) return -INFINITY;
  const int position = query_tile_of(w, warpgroup).position;
  const int place = min(max(position, 0) / kQueryTileRows, p.test.places - 1);
  const float value = p.test.values[w.request * p.test.stride_request +
                                    w.head * p.test.stride_head + place * p.test.stride_place];
  return log_threshold(p.test.kind, value, w.keys) * kLog2e / p.score_to_log2;
}

// The distances that a head looks across.
__device__ __forceinline__ Distances distances_of(const Params& p, int head) {
  Distances d = p.distances;
  if (p.bands) {
    const int64_t limit = kUnlimited;
    d.least = max(d.least, static_cast<int>(max(-limit, min(limit, p.bands[2 * head]))));
    d.most = min(d.most, static_cast<int>(max(-limit, min(limit, p.bands[2 * head + 1]))));
  }
  return d;
}

// Reads where an item's rows and keys are.
template <typename C>
__device__ Work describe(const Params& p, const Item& item) {
  Work w;
  w.request = item.request;
  w.head = item.head;
  w.first_row = item.block * C::Layout::kRowsPerBlock;
  const Span keys = keys_of_request(p.keys, item.request);
  const Span rows = rows_of_request(p, item.request, keys.count);
  w.rows = max(0, rows.count - w.first_row);
  w.output_row = rows.first + w.first_row;
  w.keys = keys.count;
  w.offset = keys.count - rows.count;
  w.distances = distances_of(p, item.head);
  if constexpr (C::kTests) {
    for (int wg = 0; wg < C::Layout::kWarpgroups; ++wg) w.threshold[wg] = threshold_of(p, w, wg);
  }
  if constexpr (C::kVariant == Variant::kReport) {
    const int tiles = ceil_div(p.query_length, kQueryTileRows);
    w.query_tile = w.first_row / kQueryTileRows +
                   (p.cu_seqlens_q ? p.first_query_tile[item.request] : item.request * tiles);
    w.query_tiles = p.report.query_tiles;
  }
  const int first = w.first_row + w.offset;
  const int last = first + min(w.rows, C::Layout::kRowsPerBlock) - 1;
  const Range seen = keys_seen(first, last, w.distances, w.keys);
  const bool any = seen.begin < seen.end && w.distances.least <= w.distances.most;
  w.tile_begin = any ? seen.begin / C::kKeys : 0;
  w.tile_end = any ? ceil_div(seen.end, C::kKeys) : 0;
  return w;
}

// Where the keys and values that a block's work reads lie in the tensor that the copy engine sees.
struct KeySource {
  int kv_head;
  int first_token, outer;  // where not paged
  const int* pages;        // null: not paged
  int page_count;          // of the request

  __device__ KeySource(const Params& p, const Work& w)
      : kv_head(w.head / (p.heads / p.kv_heads)),
        first_token(keys_of_request(p.keys, w.request).first),
        outer(p.keys.cu_seqlens ? 0 : w.request),
        pages(p.keys.page_table ? p.keys.page_table + w.request * p.keys.page_table_stride
                                : nullptr),
        page_count(p.keys.page_table ? ceil_div(w.keys, p.keys.page_size) : 0) {}
};

// Starts the copy of one key or value tile, of `Tile`'s panels. Rows past the last page or the
// tensor become zero.
template <typename Tile, int kKeys>
__device__ void copy_tile(const KeyLayout& keys, const KeySource& source, const CUtensorMap* map,
                          uint32_t destination, uint32_t barrier, int tile) {
  const auto copy_rows = [&](int row, int token, int outer) {
#pragma unroll
    for (int panel = 0; panel < Tile::kCount; ++panel) {
      ptx::copy_box(destination + panel * Tile::kPanelBytes + row * kPanelRowBytes, map, barrier,
                    panel * kPanel, token, source.kv_head, outer, ptx::L2Hint::kLast);
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
  const uint32_t barrier = address(s.barriers.key_full[stage]);
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
      // 3. Keys, as far ahead as there are stages.
      ptx::mbarrier_wait(address(b.key_empty[keys.stage]), keys.phase ^ 1);
      const int tile = tile_at(p.order, tiles, i);
      if constexpr (C::kInt8)
        copy_quantized_tile<C>(p, s, key_map, keys.stage, source.kv_head, first_tile + tile);
      else
        copy_tile<typename L::Keys, C::kKeys>(p.keys, source, key_map,
                                              ptx::shared_address(s.key[keys.stage]),
                                              address(b.key_full[keys.stage]), tile);
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
    ptx::mbarrier_wait(address(b.work_full[works.stage]), works.phase);
    const Work w = s.work[works.stage];
    ptx::mbarrier_arrive(address(b.work_empty[works.stage]));
    works.next();
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
        // 4. No warpgroup gets more than kKeyStages tiles ahead of this one.
        ptx::mbarrier_arrive(address(b.key_empty[visit % L::kKeyStages]));
      }
    }
    before = end;
  }
}

}  // namespace blasst::cuda::prefill
