// How large the arrays of tiles are: the one place that says so. Plain functions of a problem's
// scalars.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blasst/blasst.hpp"

namespace blasst::problem {

// Of a row of q, k, v and out: the latent of multi-head latent attention (MLA), 512 and 64.
constexpr int64_t kMaxDim = 576;

enum class Phase {
  kPrefill,
  kDecode,  // the query heads of a KV head form one query tile
};

int64_t all_rows(const blasst_problem& problem);   // of all requests
int64_t most_rows(const blasst_problem& problem);  // of any request
int64_t most_keys(const blasst_problem& problem);

// Rows as they lie: [outer, tokens, heads, dim], outer being requests or pages; 1 if ragged.
struct RowTensor {
  int64_t outer, tokens;
};
RowTensor query_tensor(const blasst_problem& problem);
RowTensor key_tensor(const blasst_problem& problem);

// Arrays of tiles: [tile_heads, query_tiles, key_tiles or tile_words].
struct Geometry {
  TileShape shape;
  int64_t tile_heads;
  int64_t query_tiles;  // room for those of all requests
  int64_t key_tiles;    // of a request of the most keys
  int64_t tile_words;
};

Geometry geometry(const blasst_problem& problem, Phase phase, TileShape shape);

Plan plan_of(blasst_backend backend, const Geometry& geometry, std::size_t workspace_bytes);

}  // namespace blasst::problem
