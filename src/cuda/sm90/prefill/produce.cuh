// The producer warpgroup: work, queries, keys and values into shared memory.
#pragma once

#include "cuda/core/tile_test.h"
#include "cuda/sm90/prefill/config.cuh"
#include "cuda/sm90/prefill/request.cuh"
#include "cuda/sm90/prefill/schedule.h"

namespace blasst::cuda::prefill {

// What the test compares with, for the query tile of a warpgroup: of a tile's largest score, or
// (relative tests) of its distance to the running maximum.
__device__ __forceinline__ float threshold_of(const Params& p, const Work& w, int warpgroup) {
  if (p.test == BLASST_TEST_NONE) return -INFINITY;
  const int position = w.first_row + warpgroup * kRowsPerWarpgroup + w.offset;
  const int place = min(max(position, 0) / kRowsPerWarpgroup, p.threshold_places - 1);
  const float value =
      p.thresholds[w.request * p.threshold_stride_request + w.head * p.threshold_stride_head +
                   place * p.threshold_stride_place];
  return log_threshold(p.test, value, w.keys) * kLog2e / p.score_to_log2;
}

// Reads where an item's rows and keys are.
template <typename C>
__device__ Work describe(const Params& p, const Item& item) {
  Work w;
  w.request = item.request;
  w.head = item.head;
  w.first_row = item.block * C::Layout::kRowsPerBlock;
  const Span keys = keys_of_request(p, item.request);
  const Span rows = rows_of_request(p, item.request, keys.count);
  w.rows = max(0, rows.count - w.first_row);
  w.output_row = rows.first + w.first_row;
  w.keys = keys.count;
  w.offset = keys.count - rows.count;
  w.least = p.least_distance, w.most = p.most_distance;
  if (p.bands) {
    const int64_t limit = kUnlimited;
    w.least = max(w.least, static_cast<int>(max(-limit, min(limit, p.bands[2 * item.head]))));
    w.most = min(w.most, static_cast<int>(max(-limit, min(limit, p.bands[2 * item.head + 1]))));
  }
  if constexpr (C::kTests) {
    for (int wg = 0; wg < C::Layout::kWarpgroups; ++wg) w.threshold[wg] = threshold_of(p, w, wg);
  }
  if constexpr (C::kReports) {
    const int tiles = (p.query_length + kRowsPerWarpgroup - 1) / kRowsPerWarpgroup;
    w.query_tile = w.first_row / kRowsPerWarpgroup +
                   (p.cu_seqlens_q ? p.first_query_tile[item.request] : item.request * tiles);
    w.query_tiles = p.query_tiles;
  }
  const int first = w.first_row + w.offset;
  const int last = first + min(w.rows, C::Layout::kRowsPerBlock) - 1;
  const KeyRange seen = keys_of(first, last, w.least, w.most, w.keys);
  const bool any = seen.begin < seen.end && w.least <= w.most;
  w.tile_begin = any ? seen.begin / C::kKeys : 0;
  w.tile_end = any ? (seen.end + C::kKeys - 1) / C::kKeys : 0;
  return w;
}

// Where a request's keys lie in the tensor that the copy engine sees.
struct KeySource {
  int first_token, outer;
  const int* pages;  // null: not paged
  int page_count;    // of the request

  __device__ KeySource(const Params& p, const Work& w)
      : first_token(keys_of_request(p, w.request).first),
        outer(p.cu_seqlens_k ? 0 : w.request),
        pages(p.page_table ? p.page_table + w.request * p.page_table_stride : nullptr),
        page_count(p.page_table ? (w.keys + p.page_size - 1) / p.page_size : 0) {}
};

// Starts the copy of one key or value tile. Rows past the last page or the tensor become zero.
template <typename C>
__device__ void copy_tile(const Params& p, const KeySource& source, const CUtensorMap* map,
                          uint32_t destination, uint32_t barrier, int kv_head, int tile) {
  constexpr int kKeys = C::kKeys;
  ptx::mbarrier_arrive_expect(barrier, C::Layout::kTileBytes);
  if (!source.pages) {
#pragma unroll
    for (int panel = 0; panel < C::Layout::kPanels; ++panel) {
      ptx::copy_box(destination + panel * C::Layout::kKeyPanelBytes, map, barrier, panel * kPanel,
                    source.first_token + tile * kKeys, kv_head, source.outer, ptx::L2Hint::kLast);
    }
    return;
  }
  const int box = min(p.page_size, kKeys);
  for (int row = 0; row < kKeys; row += box) {
    const int token = tile * kKeys + row;
    const int page = token / p.page_size;
    const int id = page < source.page_count ? source.pages[page] : p.pages;
#pragma unroll
    for (int panel = 0; panel < C::Layout::kPanels; ++panel) {
      ptx::copy_box(destination + panel * C::Layout::kKeyPanelBytes + row * kPanelRowBytes, map,
                    barrier, panel * kPanel, token % p.page_size, kv_head, id, ptx::L2Hint::kLast);
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
    more = index < items;
    Work w{};
    if (more) {
      w = describe<C>(p, p.first_block
                             ? item_of_list(index, p.first_block, p.batch, p.heads, p.section_heads)
                             : item_at(index, p.batch, p.heads, p.row_blocks, p.section_heads));
      index = gridDim.x + atomicAdd(p.next_item, 1);
    }
    ptx::mbarrier_wait(address(b.work_empty[works.stage]), works.phase ^ 1);
    s.work[works.stage] = w;
    ptx::mbarrier_arrive(address(b.work_full[works.stage]));
    works.next();
    if (w.tile_begin >= w.tile_end) continue;

    const KeySource source(p, w);
    const int kv_head = w.head / (p.heads / p.kv_heads);
    for (int i = 0; i < w.tile_end - w.tile_begin; ++i) {
      const int tile = tile_at(p.order, w.tile_begin, w.tile_end, i);
      ptx::mbarrier_wait(address(b.key_empty[keys.stage]), keys.phase ^ 1);
      copy_tile<C>(p, source, key_map, ptx::shared_address(s.key[keys.stage]),
                   address(b.key_full[keys.stage]), kv_head, tile);
      keys.next();
      if (i > 0) continue;
      // The first scores need keys and queries; the previous item's queries are free about now.
      ptx::mbarrier_wait(address(b.query_empty), query_phase ^ 1);
      query_phase ^= 1;
      ptx::mbarrier_arrive_expect(address(b.query_full), L::kWarpgroups * L::kQueryBytes);
      const int row = row_in_tensor(p, w.request, w.output_row);
      const int outer = p.cu_seqlens_q ? 0 : w.request;
      for (int wg = 0; wg < L::kWarpgroups; ++wg) {
        for (int panel = 0; panel < L::kPanels; ++panel) {
          ptx::copy_box(ptx::shared_address(s.query[wg]) + panel * L::kQueryPanelBytes, query_map,
                        address(b.query_full), panel * kPanel, row + wg * kRowsPerWarpgroup, w.head,
                        outer, ptx::L2Hint::kFirst);
        }
      }
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
    ptx::mbarrier_wait(address(b.work_full[works.stage]), works.phase);
    const Work w = s.work[works.stage];
    ptx::mbarrier_arrive(address(b.work_empty[works.stage]));
    works.next();
    if (w.rows == 0) return;
    const KeySource source(p, w);
    const int kv_head = w.head / (p.heads / p.kv_heads);
    const int end = before + w.tile_end - w.tile_begin;
    int visit = before + (stage - before % L::kValueStages + L::kValueStages) % L::kValueStages;
    for (; visit < end; visit += L::kValueStages) {
      const uint32_t full = address(b.value_full[visit % L::kValueBarriers]);
      const auto load = [&] {
        copy_tile<C>(p, source, value_map, ptx::shared_address(s.value[stage]), full, kv_head,
                     tile_at(p.order, w.tile_begin, w.tile_end, visit - before));
      };
      const int previous = visit - L::kValueStages;
      if (previous >= 0) {
        ptx::mbarrier_wait(address(b.value_done[previous % L::kValueBarriers]),
                           previous / L::kValueBarriers & 1);
      }
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
        // No warpgroup gets more than kKeyStages tiles ahead of this one.
        ptx::mbarrier_arrive(address(b.key_empty[visit % L::kKeyStages]));
      }
    }
    before = end;
  }
}

}  // namespace blasst::cuda::prefill
