// What a block of threads works on at a time.
#pragma once

#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/params.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/tensor.h"
#include "cuda/core/tile_test.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::prefill {

// A block of query rows of one head. Written by one
// thread, read by everyone.
struct Work {
  int request, head;
  int first_row;  // of the block, within the request
  int rows;       // left in the request from there on; 0: no more work
  int offset;     // position of query 0
  int keys;
  Distances distances;
  int tile_begin, tile_end;
  int output_row;                    // of first_row, among the rows of all requests
  float threshold[kMostQueryTiles];  // of the tile test, as scores are kept
  Range whole[kMostQueryTiles];      // tiles of which all rows of a query tile see all keys
  // Reports only: the query tile of first_row, among those of all requests, and their number.
  int query_tile, query_tiles;
};

// The 64 query rows that decide together.
struct QueryTile {
  int position;  // of its first row
  int rows;      // that exist; may be negative
};

__device__ __forceinline__ QueryTile query_tile_of(const Work& work, int tile) {
  return {work.first_row + work.offset + tile * kQueryTileRows,
          min(kQueryTileRows, work.rows - tile * kQueryTileRows)};
}

// Tiles of which every row sees every key. Rows beyond the request see none.
template <int kKeys>
__device__ __forceinline__ Range whole_tiles(const Work& work, QueryTile q) {
  const int last = q.position + max(q.rows, 1) - 1;
  const int begin = max(0, last - work.distances.most);
  const int end = min(work.keys, q.position - work.distances.least + 1);
  const Range tiles = {ceil_div(begin, kKeys), end / kKeys};
  return q.rows == kQueryTileRows && tiles.begin < tiles.end ? tiles : Range{0, 0};
}

// What the test compares with, for a query tile of an item: of a tile's largest score, or
// (relative tests) of its distance to the running maximum.
__device__ __forceinline__ float threshold_of(const Params& p, const Work& w, int tile) {
  if (p.test.kind == BLASST_TEST_NONE) return -INFINITY;
  const int position = query_tile_of(w, tile).position;
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
  w.first_row = item.block * C::kRowsPerBlock;
  const Span keys = keys_of_request(p.keys, item.request);
  const Span rows = rows_of_request(p, item.request, keys.count);
  w.rows = max(0, rows.count - w.first_row);
  w.output_row = rows.first + w.first_row;
  w.keys = keys.count;
  w.offset = keys.count - rows.count;
  w.distances = distances_of(p, item.head);
  if constexpr (C::kTests) {
    for (int tile = 0; tile < C::kRowsPerBlock / kQueryTileRows; ++tile)
      w.threshold[tile] = threshold_of(p, w, tile);
    const int tiles = ceil_div(p.query_length, kQueryTileRows);
    w.query_tile = w.first_row / kQueryTileRows +
                   (p.cu_seqlens_q ? p.first_query_tile[item.request] : item.request * tiles);
    w.query_tiles = p.report.query_tiles;
  }
  const int first = w.first_row + w.offset;
  const int last = first + min(w.rows, C::kRowsPerBlock) - 1;
  const Range seen = keys_seen(first, last, w.distances, w.keys);
  const bool any = seen.begin < seen.end && w.distances.least <= w.distances.most;
  w.tile_begin = any ? seen.begin / C::kKeys : 0;
  w.tile_end = any ? ceil_div(seen.end, C::kKeys) : 0;
  for (int tile = 0; tile < C::kRowsPerBlock / kQueryTileRows; ++tile)
    w.whole[tile] = whole_tiles<C::kKeys>(w, query_tile_of(w, tile));
  return w;
}

// Where the keys and values that a block's work reads lie in their tensors.
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

}  // namespace blasst::cuda::prefill
