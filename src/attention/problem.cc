#include "attention/problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>

#include "attention/checks.h"
#include "attention/element.h"

namespace blasst::attention {
namespace {

template <typename T>
concept HasRaggedQueries = requires(const T& p) {
  p.cu_seqlens_q;
};

template <typename T>
concept HasQueryLengths = requires(const T& p) {
  p.query_lengths;
};

// A copy of prefix sums: from 0, never falling, at most kMaxCount.
std::vector<int32_t> checked_cu_seqlens(std::string_view name, const int32_t* values,
                                        int64_t batch) {
  const std::vector<int32_t> cu(values, values + batch + 1);
  if (cu[0] != 0) fail("{}[0] is {}; it must be 0", name, cu[0]);
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] < cu[b])
      fail("{}[{}] is {}, less than {} before it; it must not fall", name, b + 1, cu[b + 1], cu[b]);
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
               places == 1 ? "" : fmt::format(", place {}", place), value, allowed);
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

// Fills requests' keys; checks lengths, cu_seqlens, page table, and the K and V views.
void resolve_keys(Problem& p) {
  const KeysValues& kv = p.kv;
  if (kv.starts)
    throw Error(BLASST_UNSUPPORTED,
                "kv.starts is set; on the cpu a padded request is a call of its own");
  int64_t outer = p.batch, tokens = kv.key_length;
  if (kv.cu_seqlens) {
    if (kv.page_table || kv.lengths)
      fail("kv.cu_seqlens is set together with kv.page_table or kv.lengths; choose one layout");
    const auto cu = checked_cu_seqlens("kv.cu_seqlens", kv.cu_seqlens, p.batch);
    for (int64_t b = 0; b < p.batch; ++b) {
      p.requests[b].first_key = cu[b];
      p.requests[b].keys = cu[b + 1] - cu[b];
    }
    outer = 1;
    tokens = cu[p.batch];
  } else {
    int64_t most = kv.key_length;
    if (kv.page_table) {
      check_range("kv.page_size", kv.page_size, 1, 256);
      check_range("kv.pages", kv.pages, 0, kMaxCount);
      check_range("kv.page_table_stride", kv.page_table_stride, 0, kMaxCount);
      if (!kv.lengths) fail("kv.lengths is null; paged keys need the length of each request");
      most = std::min(kMaxCount, kv.page_table_stride * kv.page_size);
      outer = kv.pages;
      tokens = kv.page_size;
    } else {
      check_range("kv.key_length", kv.key_length, 0, kMaxCount);
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t keys = kv.lengths ? kv.lengths[b] : kv.key_length;
      if (keys < 0 || keys > most)
        fail("kv.lengths[{}] is {}; it must be 0 to {} ({})", b, keys, most,
             kv.page_table ? "page_table_stride * page_size" : "kv.key_length");
      p.requests[b].keys = keys;
      if (!kv.page_table) continue;
      p.requests[b].first_page = std::ssize(p.pages);
      for (int64_t i = 0; i < ceil_div(keys, kv.page_size); ++i) {
        const int32_t page = kv.page_table[b * kv.page_table_stride + i];
        if (page < 0 || page >= kv.pages)
          fail("kv.page_table[{}, {}] is {}; kv.pages is {}", b, i, page, kv.pages);
        p.pages.push_back(page);
      }
    }
  }
  for (const Request& r : p.requests) p.max_keys = std::max(p.max_keys, r.keys);
  if (p.max_keys > 0) {
    check_view("k", kv.k, p.dtype, outer, tokens, p.kv_heads, p.head_dim);
    check_view("v", kv.v, p.dtype, outer, tokens, p.kv_heads, p.value_dim);
  }
}

template <typename Params>
void resolve_queries(Problem& p, const Params& params) {
  int64_t outer = p.batch, tokens = params.query_length;
  p.ragged_queries = false;
  if constexpr (HasRaggedQueries<Params>) p.ragged_queries = params.cu_seqlens_q != nullptr;
  if (p.ragged_queries) {
    if constexpr (HasRaggedQueries<Params>) {
      const auto cu = checked_cu_seqlens("cu_seqlens_q", params.cu_seqlens_q, p.batch);
      for (int64_t b = 0; b < p.batch; ++b) {
        p.requests[b].first_row = cu[b];
        p.requests[b].rows = cu[b + 1] - cu[b];
      }
      outer = 1;
      tokens = cu[p.batch];
      p.rows = tokens;
    }
  } else {
    for (int64_t b = 0; b < p.batch; ++b) p.requests[b] = {.first_row = b * tokens, .rows = tokens};
    p.rows = p.batch * tokens;
  }
  check_view("q", p.q, p.dtype, outer, tokens, p.heads, p.head_dim);
  check_view("out", p.out, p.dtype, outer, tokens, p.heads, p.value_dim);
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

template <typename Params>
Problem resolve(const Params& params, bool decode) {
  check_scalars(params);
  if constexpr (HasQueryLengths<Params>) {
    if (params.query_lengths)
      throw Error(BLASST_UNSUPPORTED,
                  "query_lengths is set; on the cpu a padded request is a call of its own");
  }

  Problem p{
      .dtype = params.dtype,
      .pack_heads = decode,
      .batch = params.batch,
      .heads = params.heads,
      .kv_heads = params.kv_heads,
      .head_dim = params.head_dim,
      .value_dim = params.value_dim,
      .query_length = params.query_length,
      .requests = std::vector<Request>(params.batch),
      .pages = {},
      .q = params.q,
      .out = params.out,
      .ragged_queries = false,
      .kv = params.kv,
      .scale = params.scale > 0 ? params.scale : 1 / std::sqrt(static_cast<float>(params.head_dim)),
      .softcap = params.softcap,
      .sinks = params.sinks,
      .mask = params.mask,
      .order = params.order,
      .test = params.test,
      .report = params.report};
  resolve_queries(p, params);
  resolve_keys(p);
  check_not_shared("out", p.out, "q", p.q, p.dtype);
  check_not_shared("out", p.out, "k", p.kv.k, p.dtype);
  check_not_shared("out", p.out, "v", p.kv.v, p.dtype);
  check_mask(p);
  check_thresholds(p.test, p.batch, p.heads);
  if (p.sinks) {
    for (int64_t h = 0; h < p.heads; ++h) {
      if (!(p.sinks[h] < std::numeric_limits<float>::infinity()))
        fail("sinks[{}] is {}; it must be finite or -inf", h, p.sinks[h]);
    }
  }
  return p;
}

// A key has one gradient, and one stripe of keys writes it.
void check_no_shared_page(const Problem& p) {
  if (!p.kv.page_table) return;
  std::vector<int64_t> user(p.kv.pages, -1);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t token = 0; token < p.requests[b].keys; token += p.kv.page_size) {
      const int64_t page = p.page_of(b, token);
      if (user[page] >= 0)
        throw Error(BLASST_UNSUPPORTED,
                    fmt::format("page {} is used by requests {} and {}; backward needs pages that "
                                "are used once",
                                page, user[page], b));
      user[page] = b;
    }
  }
}

// The prefill whose gradients are asked for.
PrefillParams forward_of(const BackwardParams& b) {
  return {.backend = b.backend,
          .dtype = b.dtype,
          .batch = b.batch,
          .heads = b.heads,
          .kv_heads = b.kv_heads,
          .head_dim = b.head_dim,
          .value_dim = b.value_dim,
          .query_length = b.query_length,
          .cu_seqlens_q = b.cu_seqlens_q,
          .q = b.q,
          .out = b.out,
          .kv = b.kv,
          .scale = b.scale,
          .softcap = b.softcap,
          .sinks = b.sinks,
          .mask = b.mask,
          .test = {},
          .report = {},
          .threads = b.threads,
          .workspace = b.workspace,
          .workspace_bytes = b.workspace_bytes,
          .rows = 0,
          .stream = nullptr,
          .query_lengths = nullptr};
}

}  // namespace

void check_tile_maxima(const Problem& p, TileShape shape) {
  if (p.report.tile_maxima)
    check_range("report.tile_maxima_stride", p.report.tile_maxima_stride,
                ceil_div(p.max_keys, shape.keys),
                most_stride(p.tile_heads() * p.query_tile_count(shape.query_rows)));
}

void check_block_mask(const Problem& p, TileShape shape) {
  if (!p.mask.blocks) return;
  const int64_t key_tiles = ceil_div(p.max_keys, shape.keys);
  const int64_t query_tiles = p.query_tile_count(shape.query_rows);
  check_range("mask.blocks_stride_query_tile", p.mask.blocks_stride_query_tile, key_tiles,
              most_stride(query_tiles));
  check_range("mask.blocks_stride_head", p.mask.blocks_stride_head,
              query_tiles * p.mask.blocks_stride_query_tile, most_stride(p.tile_heads()));
}

Problem make_problem(const PrefillParams& params) { return resolve(params, false); }
Problem make_problem(const DecodeParams& params) { return resolve(params, true); }

BackwardProblem make_problem(const BackwardParams& params) {
  BackwardProblem b{.forward = make_problem(forward_of(params)),
                    .dout = params.dout,
                    .dq = params.dq,
                    .dk = params.dk,
                    .dv = params.dv,
                    .lse = params.lse,
                    .dlse = params.dlse,
                    .tile_bits = params.tile_bits,
                    .dsinks = params.dsinks};
  const Problem& p = b.forward;
  check_no_shared_page(p);
  if (!b.lse && p.rows > 0) fail("lse is null; backward needs what prefill reported");
  if (b.dsinks && !p.sinks) fail("dsinks is set but sinks is null");
  const int64_t outer = p.ragged_queries ? 1 : p.batch;
  const int64_t tokens = p.ragged_queries ? p.rows : params.query_length;
  check_view("dout", b.dout, p.dtype, outer, tokens, p.heads, p.value_dim);

  struct Gradient {
    std::string_view name;
    const View& view;
    int64_t outer, tokens, heads, dim;
  };
  const KeyTensor keys = p.key_tensor();
  const std::array gradients{
      Gradient{"dq", b.dq, outer, tokens, p.heads, p.head_dim},
      Gradient{"dk", b.dk, keys.outer, keys.tokens, p.kv_heads, p.head_dim},
      Gradient{"dv", b.dv, keys.outer, keys.tokens, p.kv_heads, p.value_dim}};
  const std::array<std::pair<std::string_view, const View*>, 5> inputs{
      {{"q", &p.q}, {"k", &p.kv.k}, {"v", &p.kv.v}, {"out", &p.out}, {"dout", &b.dout}}};
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Gradient& g = gradients[i];
    check_view(g.name, g.view, p.dtype, g.outer, g.tokens, g.heads, g.dim);
    if (g.outer > 0 && g.tokens > 0)
      check_no_overlap(g.name, g.view, g.outer, g.tokens, g.heads, g.dim);
    for (const auto& [name, input] : inputs)
      check_not_shared(g.name, g.view, name, *input, p.dtype);
    for (size_t other = 0; other < i; ++other)
      check_not_shared(g.name, g.view, gradients[other].name, gradients[other].view, p.dtype);
  }
  return b;
}

KeyTensor Problem::key_tensor() const {
  if (kv.cu_seqlens) return {1, batch > 0 ? requests.back().first_key + requests.back().keys : 0};
  if (kv.page_table) return {kv.pages, kv.page_size};
  return {batch, kv.key_length};
}

std::byte* row_at(const View& view, DType dtype, int64_t outer, int64_t token, int64_t head) {
  return static_cast<std::byte*>(view.data) +
         element_bytes(dtype) *
             (outer * view.stride_request + token * view.stride_token + head * view.stride_head);
}

std::byte* Problem::query_row(const View& view, int64_t request, int64_t position,
                              int64_t head) const {
  if (ragged_queries) return row_at(view, dtype, 0, requests[request].first_row + position, head);
  return row_at(view, dtype, request, position, head);
}

std::byte* Problem::key_row(const View& view, int64_t request, int64_t token,
                            int64_t kv_head) const {
  if (kv.cu_seqlens) return row_at(view, dtype, 0, requests[request].first_key + token, kv_head);
  if (!kv.page_table) return row_at(view, dtype, request, token, kv_head);
  return row_at(view, dtype, page_of(request, token), token % kv.page_size, kv_head);
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

void Problem::rows_of(const View& view, int64_t request, Range tokens, int64_t kv_head,
                      const std::byte** rows) const {
  const int64_t stride = view.stride_token * element_bytes(dtype);
  for (int64_t token = tokens.begin; token < tokens.end;) {
    const int64_t in_page =
        kv.page_table ? kv.page_size - token % kv.page_size : tokens.end - token;
    const std::byte* row = key_row(view, request, token, kv_head);
    for (const int64_t end = std::min(tokens.end, token + in_page); token < end; ++token) {
      *rows++ = row;
      row += stride;
    }
  }
}

int64_t Problem::query_tile_count(int64_t query_rows) const {
  if (pack_heads) return batch;
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
      for (int64_t h = 0; h < heads; h += group())
        tiles.push_back({b, h, group(), 0, positions, b});
      continue;
    }
    const int64_t count = ceil_div(positions, query_rows);
    if (count == 0) continue;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = i * query_rows;
        tiles.push_back({b, h, 1, first, std::min(query_rows, positions - first), index + i});
      }
    }
    index += count;
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

}  // namespace blasst::attention
