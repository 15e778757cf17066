#include "cpu/backward/plan.h"

#include <algorithm>
#include <array>

namespace blasst::cpu {
namespace {

using problem::ceil_div;

// Enough units for a few dozen threads, and each stripe costs memory for a part of dq.
constexpr int64_t kUnits = 16;
constexpr int64_t kMostStripes = 8;

int64_t most_stripes(const Problem& p) {
  return std::clamp<int64_t>(kUnits / p.kv_heads, 1, kMostStripes);
}

BackwardTile make_tile(const Problem& p, const QueryTile& query) {
  BackwardTile tile{query, {}, {0, p.requests[query.request].keys}};
  std::array<Range, kQueryRows> rows;
  for (int64_t r = 0; r < query.rows(); ++r) {
    rows[r] = p.row_keys(query, r);
    tile.inner = intersect(tile.inner, rows[r]);
  }
  tile.key_tiles = problem::tile_range({rows.data(), static_cast<size_t>(query.rows())}, kKeys);
  return tile;
}

}  // namespace

BackwardPlan::BackwardPlan(const problem::BackwardProblem& backward)
    : problem(backward), geometry_(backward.forward.geometry(prefill_shape())) {
  const Problem& p = problem.forward;
  for (const QueryTile& query : p.query_tiles(kQueryRows)) tiles.push_back(make_tile(p, query));
  std::span<const BackwardTile> rest = tiles;
  for (int64_t request = 0; request < p.batch; ++request) {
    const int64_t key_tiles = ceil_div(p.requests[request].keys, kKeys);
    const int64_t group_tiles = p.group() * ceil_div(p.requests[request].rows, kQueryRows);
    for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
      const std::span<const BackwardTile> group = rest.first(group_tiles);
      rest = rest.subspan(group_tiles);
      std::vector<int64_t> before(key_tiles + 1);  // kept pairs before each key tile
      for (const BackwardTile& tile : group) {
        for (int64_t j = tile.key_tiles.begin; j < tile.key_tiles.end; ++j)
          before[j + 1] += kept(tile, j);
      }
      for (int64_t j = 0; j < key_tiles; ++j) before[j + 1] += before[j];
      int64_t begin = 0;
      const int64_t count = stripes(request);
      for (int64_t stripe = 0; stripe < count; ++stripe) {
        // The cut that leaves the stripes before it their share of the pairs.
        const int64_t share = before.back() * (stripe + 1) / count;
        const int64_t end = stripe + 1 == count ? key_tiles
                                                : std::ranges::lower_bound(before.begin() + begin,
                                                                           before.end(), share) -
                                                      before.begin();
        units.push_back(
            {request, kv_head, group, {begin, end}, stripe, before[end] - before[begin]});
        begin = end;
      }
    }
  }
  std::ranges::stable_sort(units, std::ranges::greater{}, &BackwardUnit::pairs);
}

bool BackwardPlan::kept(const BackwardTile& tile, int64_t key_tile) const {
  return key_tile >= tile.key_tiles.begin && key_tile < tile.key_tiles.end &&
         problem.kept(tile.query, geometry_, key_tile);
}

int64_t BackwardPlan::stripes(int64_t request) const {
  const int64_t key_tiles = ceil_div(problem.forward.requests[request].keys, kKeys);
  return std::clamp<int64_t>(key_tiles, 1, most_stripes(problem.forward));
}

int64_t BackwardPlan::first_row(const QueryTile& tile) const {
  const Problem& p = problem.forward;
  return tile.head * p.rows + p.requests[tile.request].first_row + tile.first_position;
}

float* BackwardPlan::dq_of(const QueryTile& tile, int64_t stripe) const {
  const Problem& p = problem.forward;
  return dq + (stripe * p.heads * p.rows + first_row(tile)) * padded(p.head_dim);
}

size_t backward_row_floats(const Problem& p) { return p.heads * p.rows; }

size_t backward_dq_floats(const Problem& p) {
  return most_stripes(p) * p.heads * p.rows * padded(p.head_dim);
}

size_t backward_scratch_floats(const Problem& p) {
  const int64_t qk = staged_stride(p.head_dim), v = staged_stride(p.value_dim);
  return kQueryRows * (qk + v) + kKeys * (2 * qk + v + p.head_dim + p.value_dim) +
         2 * kQueryRows * kKeys + 3 * kQueryRows;
}

}  // namespace blasst::cpu
