#include "problem/geometry.h"

#include <algorithm>

#include "problem/parts.h"
#include "problem/tiles.h"

namespace blasst::problem {

int64_t all_rows(const blasst_problem& p) {
  return p.query_layout == BLASST_LAYOUT_RAGGED ? p.rows : p.batch * p.query_length;
}

int64_t most_rows(const blasst_problem& p) {
  const bool unsaid = p.query_layout == BLASST_LAYOUT_RAGGED && p.query_length == 0;
  return unsaid ? p.rows : p.query_length;
}

int64_t most_keys(const blasst_problem& p) {
  if (p.kv.key_length > 0) return p.kv.key_length;
  if (p.kv.layout == BLASST_LAYOUT_RAGGED) return p.kv.tokens;
  if (p.kv.layout == BLASST_LAYOUT_PAGED) return p.kv.page_table_stride * p.kv.page_size;
  return 0;
}

RowTensor query_tensor(const blasst_problem& p) {
  if (p.query_layout == BLASST_LAYOUT_RAGGED) return {1, p.rows};
  return {p.batch, p.query_length};
}

RowTensor key_tensor(const blasst_problem& p) {
  if (p.kv.layout == BLASST_LAYOUT_RAGGED) return {1, p.kv.tokens};
  if (p.kv.layout == BLASST_LAYOUT_PAGED) return {p.kv.pages, p.kv.page_size};
  return {p.batch, p.kv.key_length};
}

int64_t head_parts(const blasst_problem& p, int64_t query_rows) {
  const int64_t group = p.heads / p.kv_heads,
                most = std::max<int64_t>(1, query_rows / std::max<int64_t>(1, most_rows(p)));
  int64_t parts = ceil_div(group, most);
  while (group % parts != 0) ++parts;
  return parts;
}

Geometry geometry(const blasst_problem& p, Phase phase, TileShape shape) {
  Geometry g{};
  g.shape = shape;
  g.tile_heads = p.heads;
  if (phase == Phase::kDecode) {
    g.tile_heads = p.kv_heads * head_parts(p, shape.query_rows);
    g.query_tiles = p.batch;
  } else if (p.query_layout == BLASST_LAYOUT_RAGGED) {
    // The most that requests of so many rows in all can have: as many last tiles of one row as can
    // be.
    g.query_tiles =
        std::min(p.rows, (p.rows + p.batch * (shape.query_rows - 1)) / shape.query_rows);
  } else {
    g.query_tiles = p.batch * ceil_div(p.query_length, shape.query_rows);
  }
  g.key_tiles = ceil_div(most_keys(p), shape.keys);
  g.tile_words = ceil_div(g.key_tiles, 32);
  return g;
}

Plan plan_of(blasst_backend backend, const Geometry& g, std::size_t workspace_bytes) {
  return {.backend = backend,
          .shape = g.shape,
          .tile_heads = g.tile_heads,
          .query_tiles = g.query_tiles,
          .key_tiles = g.key_tiles,
          .tile_words = g.tile_words,
          .workspace_bytes = workspace_bytes};
}

}  // namespace blasst::problem
