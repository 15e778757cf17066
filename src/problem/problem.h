// A validated attention problem: what prefill and decode have in common once their parameters are
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "blasst/blasst.hpp"
#include "problem/element.h"
#include "problem/geometry.h"
#include "problem/tiles.h"

namespace blasst::problem {

struct Request {
  int64_t first_row = 0;  // in the rows of all requests, those that are padding included
  int64_t rows = 0;       // query positions
  int64_t first_key = 0;  // token of key 0: dense, among the request's; ragged, among all
  int64_t keys = 0;
  int64_t first_page = 0;  // paged keys: index in the pages of all requests
};

// The rows that decide together: `positions` query positions of `heads` query heads that share a KV
// head. Row r is position r / heads, head r % heads.
struct QueryTile {
  int64_t request;
  int64_t head;
  int64_t heads;           // prefill: 1
  int64_t first_position;  // within the request
  int64_t positions;
  int64_t index;  // among the query tiles of all requests; decode: the request

  int64_t rows() const { return positions * heads; }
  int64_t position_of(int64_t row) const { return first_position + row / heads; }
  int64_t head_of(int64_t row) const { return head + row % heads; }
};

// A row of a tensor [outer, tokens, heads, dim].
std::byte* row_at(const View& view, int64_t outer, int64_t token, int64_t head);

struct Problem {
  blasst_problem given;
  Phase phase;
  DType dtype;
  bool pack_heads;  // decode: the query heads of a KV head form one query tile
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  int64_t rows = 0;               // of all requests, those that are padding included
  int64_t max_rows = 0;           // that any request has room for
  int64_t max_keys = 0;           // of any request, of those in use
  std::vector<Request> requests;  // empty: only the scalars are known
  // The index arrays as they were when they were checked: what the caller does to them meanwhile
  // must not lead a kernel out of a tensor.
  std::vector<int32_t> pages = {};  // paged keys: page ids in use, request by request
  View q, out;
  KeysValues kv;
  float scale, softcap;
  Scales k_scales, v_scales;
  const float* sinks;
  Mask mask;
  Order order;
  TileTest test;
  Scores scores;
  Report report;

  bool ragged_queries() const { return given.query_layout == BLASST_LAYOUT_RAGGED; }
  bool is_padded() const { return given.kv.starts || given.query_lengths; }
  Geometry geometry(TileShape shape) const { return problem::geometry(given, phase, shape); }

  int64_t group() const { return heads / kv_heads; }
  bool scores_take_bytes() const { return problem::scores_take_bytes(scores, kv.k.dtype); }
  int64_t page_of(int64_t request, int64_t token) const {
    return pages[requests[request].first_page + token / kv.page_size];
  }
  // Where a view laid out as q, or as k and v, holds a row.
  std::byte* query_row(const View& view, int64_t request, int64_t position, int64_t head) const;
  RowTensor query_tensor() const { return problem::query_tensor(given); }
  RowTensor key_tensor() const { return problem::key_tensor(given); }
  std::byte* key_row(const View& view, int64_t request, int64_t token, int64_t kv_head) const;

  // What q.k, and a sum over v, are multiplied by.
  float score_scale(int64_t request, int64_t kv_head) const;
  float value_scale(int64_t request, int64_t kv_head) const;

  const std::byte* query(int64_t request, int64_t position, int64_t head) const;
  std::byte* output(int64_t request, int64_t position, int64_t head) const;
  const std::byte* key(int64_t request, int64_t token, int64_t kv_head) const;
  const std::byte* value(int64_t request, int64_t token, int64_t kv_head) const;

  // Whether every value row is a part of its key's row, as in the latents of MLA: whoever has read
  // the keys has the values at hand.
  bool values_lie_in_keys() const;

  // Addresses of the rows of `tokens` in kv.k or kv.v.
  void rows_of(const View& view, int64_t request, Range tokens, int64_t kv_head,
               const std::byte** rows) const;

  // Visits the rows, of those of all requests, that are padding.
  template <typename Visit>  // (request, row)
  void for_padding(const Visit& visit) const {
    for (int64_t request = 0; is_padded() && request < batch; ++request) {
      const Request& r = requests[request];
      for (int64_t row = request * max_rows; row < (request + 1) * max_rows; ++row)
        if (row < r.first_row || row >= r.first_row + r.rows) visit(request, row);
    }
  }

  // Whether such a row is in use, and stands before every key: the sink is all that it has.
  bool has_sink_alone(int64_t request, int64_t row) const {
    return sinks && row < requests[request].first_row;
  }
  float padding_lse(int64_t request, int64_t row, int64_t head) const {
    return has_sink_alone(request, row) ? sinks[head] : -std::numeric_limits<float>::infinity();
  }

  // All query tiles, `query_rows` positions each (decode: one a request and KV head).
  std::vector<QueryTile> query_tiles(int64_t query_rows) const;
  int64_t query_tile_count(int64_t query_rows) const;  // of one head, up to the last that is used

  // The keys that row `row` of the tile sees.
  Range row_keys(const QueryTile& tile, int64_t row) const;

  // Whether the block mask lets the query tile visit the key tile.
  bool block_visible(const QueryTile& tile, int64_t key_tile) const;

  // What the tested value of a row of this head must stay below for a skip, in natural log:
  // ln(threshold), tau, or -inf where nothing may be skipped.
  double skip_below(const QueryTile& tile, int64_t head, TileShape shape) const;
};

// What backward adds to the forward's problem, whose test is not set: the decisions are given.
struct BackwardProblem {
  Problem forward;
  View dout, dq, dk, dv;
  const float* lse;
  const float* dlse;
  const uint32_t* tile_bits;
  float* dsinks;

  // Whether the forward kept the key tile, of those that the query tile may visit. `geometry`: of
  // the tiles that the bits are of.
  bool kept(const QueryTile& tile, const Geometry& geometry, int64_t key_tile) const {
    if (!forward.block_visible(tile, key_tile)) return false;
    if (!tile_bits) return true;
    const int64_t row = tile.head * geometry.query_tiles + tile.index;
    return tile_bits[row * geometry.tile_words + key_tile / 32] >> (key_tile % 32) & 1;
  }
};

// The strides of the block mask cover the tiles of this shape. Throws Error.
void check_block_mask(const Problem& p, TileShape shape);

// The scalars alone, with no requests: pointers may be null. Throws Error.
Problem make_scalar_problem(const AttentionParams& params, Phase phase);

// Checks everything that can be checked without reading tensors. Throws Error.
Problem make_problem(const AttentionParams& params, Phase phase);
BackwardProblem make_problem(const BackwardParams& params);

// The forward whose gradients are asked for.
AttentionParams forward_of(const BackwardParams& params);

}  // namespace blasst::problem
