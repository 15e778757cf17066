#include "problem/problem.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>

#include "problem/checks.h"
#include "problem/element.h"
#include "problem/parts.h"
#include "problem/text.h"

namespace blasst::problem {
namespace {

// A copy of prefix sums: from 0, never falling, to `total`; no request has more than `most`.
std::vector<int32_t> checked_cu_seqlens(std::string_view name, const int32_t* values, int64_t batch,
                                        std::string_view total_name, int64_t total,
                                        std::string_view most_name, int64_t most) {
  std::vector<int32_t> cu(values, values + batch + 1);
  if (cu[0] != 0) fail("{}[0] is {}; it must be 0", name, cu[0]);
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] < cu[b])
      fail("{}[{}] is {}, less than {} before it; it must not fall", name, b + 1, cu[b + 1], cu[b]);
  }
  if (cu[batch] != total)
    fail("{} ends at {}; {} is {}, and must be the same", name, cu[batch], total_name, total);
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] - cu[b] > most)
      fail("{} gives request {} {}; {} allows {} at most", name, b, cu[b + 1] - cu[b], most_name,
           most);
  }
  return cu;
}

float threshold_at(const TileTest& test, int64_t request, int64_t head, int64_t place) {
  return test
      .values[request * test.stride_request + head * test.stride_head + place * test.stride_place];
}

void check_thresholds(const TileTest& test, int64_t batch, int64_t heads) {
  if (test.kind == BLASST_TEST_NONE) return;
  // Each value once, however many share it.
  const int64_t places = test.stride_place == 0 ? 1 : test.places;
  if (test.stride_request == 0) batch = std::min<int64_t>(batch, 1);
  if (test.stride_head == 0) heads = 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t place = 0; place < places; ++place) {
        const float value = threshold_at(test, b, h, place);
        const auto reject = [&](std::string_view what, std::string_view allowed) {
          fail("{} of request {}, head {}{} is {}; it must be {}", what, b, h,
               places == 1 ? "" : formatted(", place {}", place), value, allowed);
        };
        if (test.kind == BLASST_TEST_RELATIVE && !(value >= 0 && value <= 1))
          reject("threshold", "a number from 0 to 1");
        if (test.kind == BLASST_TEST_SCALE_FACTOR && !(value >= 0 && std::isfinite(value)))
          reject("threshold scale factor", "finite and at least 0");
        if (test.kind == BLASST_TEST_ABSOLUTE && std::isnan(value))
          reject("absolute threshold", "a number");
      }
    }
  }
}

float scale_at(const Scales& scales, int64_t request, int64_t kv_head) {
  if (!scales.values) return 1;
  return scales.values[request * scales.stride_request + kv_head * scales.stride_head];
}

bool is_scale(float x) { return x > 0 && std::isfinite(x); }

void check_scales(const Problem& p) {
  for (const auto& [name, scales] :
       {std::pair{"k_scales", &p.k_scales}, std::pair{"v_scales", &p.v_scales}}) {
    const int64_t requests = scales->stride_request == 0 ? std::min<int64_t>(p.batch, 1) : p.batch;
    const int64_t heads = scales->stride_head == 0 ? 1 : p.kv_heads;
    for (int64_t b = 0; b < requests; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        if (const float x = scale_at(*scales, b, h); !is_scale(x))
          fail("{} of request {}, KV head {} is {}; it must be positive and finite", name, b, h, x);
        if (const float x = p.score_scale(b, h); !is_scale(x))
          fail(
              "scale {} times k_scales of request {}, KV head {} is {}; it must be positive and "
              "finite",
              p.scale, b, h, x);
      }
    }
  }
}

// Fills requests' keys; checks lengths, starts, cu_seqlens, page table, and the K and V views.
void resolve_keys(Problem& p) {
  const KeysValues& kv = p.kv;
  const int64_t most = most_keys(p.given);
  if (kv.layout == BLASST_LAYOUT_RAGGED) {
    const auto cu = checked_cu_seqlens("kv.cu_seqlens", kv.cu_seqlens, p.batch, "kv.tokens",
                                       kv.tokens, "kv.key_length", most);
    for (int64_t b = 0; b < p.batch; ++b) {
      p.requests[b].first_key = cu[b];
      p.requests[b].keys = cu[b + 1] - cu[b];
    }
  } else {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t end = kv.lengths ? kv.lengths[b] : kv.key_length;
      if (end < 0 || end > most)
        fail("kv.lengths[{}] is {}; it must be 0 to {} ({})", b, end, most,
             kv.key_length > 0 || kv.layout == BLASST_LAYOUT_DENSE
                 ? "kv.key_length"
                 : "page_table_stride * page_size");
      const int64_t start = kv.starts ? kv.starts[b] : 0;
      if (start < 0 || start > end)
        fail("kv.starts[{}] is {}; it must be 0 to {}, the end of the request's keys", b, start,
             end);
      p.requests[b].first_key = start;
      p.requests[b].keys = end - start;
      if (kv.layout != BLASST_LAYOUT_PAGED) continue;
      p.requests[b].first_page = std::ssize(p.pages);
      for (int64_t i = 0; i < ceil_div(end, kv.page_size); ++i) {
        const int32_t page = kv.page_table[b * kv.page_table_stride + i];
        if (page < 0 || page >= kv.pages)
          fail("kv.page_table[{}, {}] is {}; kv.pages is {}", b, i, page, kv.pages);
        p.pages.push_back(page);
      }
    }
  }
  for (const Request& r : p.requests) p.max_keys = std::max(p.max_keys, r.keys);
  if (p.max_keys > 0) {
    const auto [outer, tokens] = p.key_tensor();
    check_view("k", kv.k, outer, tokens, p.kv_heads, p.head_dim);
    check_view("v", kv.v, outer, tokens, p.kv_heads, p.value_dim);
  }
}

// Fills requests' rows; checks cu_seqlens_q and query_lengths, and the views. After the keys: in a
// padded batch where no row looks ahead a row before every key is padding, too, so that a request
// has the query tiles that it has alone.
void resolve_queries(Problem& p) {
  const blasst_problem& given = p.given;
  const bool looks_ahead = allowed_distances(p.mask, nullptr).least < 0;
  if (p.ragged_queries()) {
    const auto cu = checked_cu_seqlens("cu_seqlens_q", given.cu_seqlens_q, p.batch, "rows",
                                       given.rows, "query_length", p.max_rows);
    for (int64_t b = 0; b < p.batch; ++b) {
      p.requests[b].first_row = cu[b];
      p.requests[b].rows = cu[b + 1] - cu[b];
    }
  } else {
    for (int64_t b = 0; b < p.batch; ++b) {
      Request& r = p.requests[b];
      const int64_t used = given.query_lengths ? given.query_lengths[b] : p.max_rows;
      if (used < 0 || used > p.max_rows)
        fail("query_lengths[{}] is {}; it must be 0 to {}, the query_length", b, used, p.max_rows);
      r.rows = p.is_padded() && !looks_ahead ? std::min(used, r.keys) : used;
      r.first_row = b * p.max_rows + used - r.rows;
    }
  }
  const auto [outer, tokens] = p.query_tensor();
  check_view("q", p.q, outer, tokens, p.heads, p.head_dim);
  check_view("out", p.out, outer, tokens, p.heads, p.value_dim);
  if (p.rows > 0) check_no_overlap("out", p.out, outer, tokens, p.heads, p.value_dim);
}

void check_mask(const Problem& p) {
  const Mask& mask = p.mask;
  if (!mask.bands) return;
  for (int64_t h = 0; h < p.heads; ++h) {
    check_range("mask.bands", mask.bands[2 * h], -kMaxCount, kMaxCount);
    check_range("mask.bands", mask.bands[2 * h + 1], -kMaxCount, kMaxCount);
    if (mask.bands[2 * h] > mask.bands[2 * h + 1])
      fail("mask.bands[{}] is {} to {}; the first distance must not exceed the last", h,
           mask.bands[2 * h], mask.bands[2 * h + 1]);
  }
}

// A key has one gradient, and one stripe of keys writes it.
void check_no_shared_page(const Problem& p) {
  if (p.kv.layout != BLASST_LAYOUT_PAGED) return;
  std::vector<int64_t> user(p.kv.pages, -1);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t token = 0; token < p.requests[b].keys; token += p.kv.page_size) {
      const int64_t page = p.page_of(b, token);
      if (user[page] >= 0)
        throw Error(BLASST_UNSUPPORTED,
                    formatted("page {} is used by requests {} and {}; backward needs pages that "
                              "are used once",
                              page, user[page], b));
      user[page] = b;
    }
  }
}

}  // namespace

void check_block_mask(const Problem& p, TileShape shape) {
  check_block_mask(p.mask, p.geometry(shape).tile_heads, p.query_tile_count(shape.query_rows),
                   ceil_div(p.max_keys, shape.keys));
}

AttentionParams forward_of(const BackwardParams& params) {
  return {.problem = params.problem, .decision = {}, .report = {}, .execution = params.execution};
}

Problem make_scalar_problem(const AttentionParams& params, Phase phase) {
  check_scalars(params, phase);
  const blasst_problem& given = params.problem;
  return {
      .given = given,
      .phase = phase,
      .dtype = given.q.dtype,
      .pack_heads = phase == Phase::kDecode,
      .batch = given.batch,
      .heads = given.heads,
      .kv_heads = given.kv_heads,
      .head_dim = given.head_dim,
      .value_dim = given.value_dim,
      .rows = all_rows(given),
      .max_rows = most_rows(given),
      .max_keys = 0,
      .requests = {},
      .q = given.q,
      .out = given.out,
      .kv = given.kv,
      .scale = given.scale > 0 ? given.scale : 1 / std::sqrt(static_cast<float>(given.head_dim)),
      .softcap = given.softcap,
      .k_scales = given.k_scales,
      .v_scales = given.v_scales,
      .sinks = given.sinks,
      .mask = given.mask,
      .order = params.decision.order,
      .test = params.decision.test,
      .scores = params.decision.scores,
      .report = params.report};
}

Problem make_problem(const AttentionParams& params, Phase phase) {
  Problem p = make_scalar_problem(params, phase);
  check_arrays(params);
  p.requests.resize(p.batch);
  resolve_keys(p);
  resolve_queries(p);
  check_not_shared("out", p.out, "q", p.q);
  check_not_shared("out", p.out, "k", p.kv.k);
  check_not_shared("out", p.out, "v", p.kv.v);
  check_mask(p);
  check_thresholds(p.test, p.batch, p.heads);
  check_scales(p);
  if (p.sinks) {
    for (int64_t h = 0; h < p.heads; ++h) {
      if (!(p.sinks[h] < std::numeric_limits<float>::infinity()))
        fail("sinks[{}] is {}; it must be finite or -inf", h, p.sinks[h]);
    }
  }
  return p;
}

BackwardProblem make_problem(const BackwardParams& params) {
  check_scalars(params);
  const Gradients& given = params.gradients;
  BackwardProblem b{.forward = make_problem(forward_of(params), Phase::kPrefill),
                    .dout = given.dout,
                    .dq = given.dq,
                    .dk = given.dk,
                    .dv = given.dv,
                    .lse = given.lse,
                    .dlse = given.dlse,
                    .tile_bits = given.tile_bits,
                    .dsinks = given.dsinks};
  check_no_shared_page(b.forward);
  check_gradients(params);
  return b;
}

std::byte* row_at(const View& view, int64_t outer, int64_t token, int64_t head) {
  return static_cast<std::byte*>(view.data) +
         element_bytes(view.dtype) *
             (outer * view.stride_request + token * view.stride_token + head * view.stride_head);
}

std::byte* Problem::query_row(const View& view, int64_t request, int64_t position,
                              int64_t head) const {
  const int64_t row = requests[request].first_row + position;
  if (ragged_queries()) return row_at(view, 0, row, head);
  return row_at(view, request, row - request * max_rows, head);
}

std::byte* Problem::key_row(const View& view, int64_t request, int64_t token,
                            int64_t kv_head) const {
  token += requests[request].first_key;
  if (kv.layout == BLASST_LAYOUT_RAGGED) return row_at(view, 0, token, kv_head);
  if (kv.layout == BLASST_LAYOUT_DENSE) return row_at(view, request, token, kv_head);
  return row_at(view, page_of(request, token), token % kv.page_size, kv_head);
}

float Problem::score_scale(int64_t request, int64_t kv_head) const {
  return scale * scale_at(k_scales, request, kv_head);
}

float Problem::value_scale(int64_t request, int64_t kv_head) const {
  return scale_at(v_scales, request, kv_head);
}

const std::byte* Problem::query(int64_t request, int64_t position, int64_t head) const {
  return query_row(q, request, position, head);
}

std::byte* Problem::output(int64_t request, int64_t position, int64_t head) const {
  return query_row(out, request, position, head);
}

const std::byte* Problem::key(int64_t request, int64_t token, int64_t kv_head) const {
  return key_row(kv.k, request, token, kv_head);
}

const std::byte* Problem::value(int64_t request, int64_t token, int64_t kv_head) const {
  return key_row(kv.v, request, token, kv_head);
}

bool Problem::values_lie_in_keys() const {
  const View &k = kv.k, &v = kv.v;
  if (!k.data || k.dtype != v.dtype) return false;
  const auto bytes = static_cast<std::byte*>(v.data) - static_cast<std::byte*>(k.data);
  const RowTensor rows = key_tensor();
  const auto steps_alike = [](int64_t count, int64_t a, int64_t b) { return count <= 1 || a == b; };
  return bytes >= 0 &&
         bytes + value_dim * element_bytes(v.dtype) <= head_dim * element_bytes(k.dtype) &&
         steps_alike(rows.outer, k.stride_request, v.stride_request) &&
         steps_alike(rows.tokens, k.stride_token, v.stride_token) &&
         steps_alike(kv_heads, k.stride_head, v.stride_head);
}

void Problem::rows_of(const View& view, int64_t request, Range tokens, int64_t kv_head,
                      const std::byte** rows) const {
  const int64_t stride = view.stride_token * element_bytes(view.dtype);
  const bool paged = kv.layout == BLASST_LAYOUT_PAGED;
  for (int64_t token = tokens.begin; token < tokens.end;) {
    const int64_t in_page = paged ? kv.page_size - token % kv.page_size : tokens.end - token;
    const std::byte* row = key_row(view, request, token, kv_head);
    for (const int64_t end = std::min(tokens.end, token + in_page); token < end; ++token) {
      *rows++ = row;
      row += stride;
    }
  }
}

int64_t Problem::query_tile_count(int64_t query_rows) const {
  if (pack_heads) return batch;
  if (!ragged_queries()) return batch * ceil_div(max_rows, query_rows);
  int64_t count = 0;
  for (const Request& r : requests) count += ceil_div(r.rows, query_rows);
  return count;
}

std::vector<QueryTile> Problem::query_tiles(int64_t query_rows) const {
  std::vector<QueryTile> tiles;
  int64_t index = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t positions = requests[b].rows;
    if (pack_heads) {
      const int64_t together = group() / head_parts(given, query_rows);
      for (int64_t h = 0; h < heads && positions > 0; h += together)
        tiles.push_back({b, h, together, 0, positions, b});
      continue;
    }
    const int64_t count = ceil_div(positions, query_rows);
    for (int64_t h = 0; h < heads && count > 0; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = i * query_rows;
        tiles.push_back({b, h, 1, first, std::min(query_rows, positions - first), index + i});
      }
    }
    // A dense request has room for the tiles of all its rows.
    index += ragged_queries() ? count : ceil_div(max_rows, query_rows);
  }
  return tiles;
}

Range Problem::row_keys(const QueryTile& tile, int64_t row) const {
  const Request& r = requests[tile.request];
  const int64_t* band = mask.bands ? mask.bands + 2 * tile.head_of(row) : nullptr;
  return visible_keys(allowed_distances(mask, band), tile.position_of(row) + r.keys - r.rows,
                      r.keys);
}

bool Problem::block_visible(const QueryTile& tile, int64_t key_tile) const {
  if (!mask.blocks) return true;
  const int64_t head = pack_heads ? tile.head / group() : tile.head;
  return mask.blocks[head * mask.blocks_stride_head + tile.index * mask.blocks_stride_query_tile +
                     key_tile] != 0;
}

double Problem::skip_below(const QueryTile& tile, int64_t head, TileShape shape) const {
  if (test.kind == BLASST_TEST_NONE) return -std::numeric_limits<double>::infinity();
  const Request& r = requests[tile.request];
  const int64_t position = std::max<int64_t>(0, tile.first_position + r.keys - r.rows);
  const int64_t place =
      std::min(test.places - 1, position / (pack_heads ? shape.keys : shape.query_rows));
  const double value = threshold_at(test, tile.request, head, place);
  if (test.kind == BLASST_TEST_ABSOLUTE) return value;
  if (test.kind == BLASST_TEST_RELATIVE) return std::log(value);
  return std::log(std::min(1.0, value / static_cast<double>(r.keys)));
}

}  // namespace blasst::problem
