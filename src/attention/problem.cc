#include "attention/problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>

#include "attention/element.h"

namespace blasst::attention {
namespace {

constexpr int64_t kMaxCount =
    std::numeric_limits<int32_t>::max();            // tokens, heads, requests, pages
constexpr int64_t kMaxElements = int64_t{1} << 47;  // a tensor; keeps byte offsets in int64

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(BLASST_INVALID_ARGUMENT, fmt::format(format, std::forward<Args>(args)...));
}

template <typename T>
concept HasRaggedQueries = requires(const T& p) {
  p.cu_seqlens_q;
};

void check_range(std::string_view name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    fail("{} is {}; it must be {} to {}", name, value, least, most);
}

void check_dim(std::string_view name, int64_t value) {
  if (value < 16 || value > 256 || value % 8 != 0)
    fail("{} is {}; it must be a multiple of 8 from 16 to 256", name, value);
}

// The view's last element, [outer - 1, tokens - 1, heads - 1, dim - 1], lies inside its buffer.
void check_view(std::string_view name, const View& view, DType dtype, int64_t outer, int64_t tokens,
                int64_t heads, int64_t dim) {
  for (const auto& [stride_name, stride] :
       {std::pair{"stride_request", view.stride_request},
        std::pair{"stride_token", view.stride_token}, std::pair{"stride_head", view.stride_head}}) {
    if (stride < 0 || stride > kMaxElements)
      fail("{}.{} is {}; it must be 0 to {} elements", name, stride_name, stride, kMaxElements);
  }
  if (view.elements < 0 || view.elements > kMaxElements)
    fail("{}.elements is {}; it must be 0 to {}", name, view.elements, kMaxElements);
  if (outer == 0 || tokens == 0) return;
  if (!view.data)
    fail("{}.data is null, with {} x {} tokens to read or write", name, outer, tokens);
  const int64_t bytes = element_bytes(dtype);
  if (reinterpret_cast<uintptr_t>(view.data) % bytes != 0)
    fail("{}.data is not aligned to its {}-byte elements", name, bytes);
  const auto last = static_cast<__int128>(outer - 1) * view.stride_request +
                    static_cast<__int128>(tokens - 1) * view.stride_token +
                    static_cast<__int128>(heads - 1) * view.stride_head + dim;
  if (last > view.elements) {
    fail("{} reaches element {} ([{}, {}, {}, {}] with strides {}, {}, {}), but {}.elements is {}",
         name,
         last > kMaxElements ? std::numeric_limits<int64_t>::max() : static_cast<int64_t>(last),
         outer, tokens, heads, dim, view.stride_request, view.stride_token, view.stride_head, name,
         view.elements);
  }
}

// No two elements of the output share an address: sorted by stride, each dimension steps over all
// that lies inside it.
void check_no_overlap(std::string_view name, const View& view, int64_t outer, int64_t tokens,
                      int64_t heads, int64_t dim) {
  struct Dimension {
    std::string_view stride_name;
    int64_t stride, size;
  };
  std::array dimensions{Dimension{"stride_request", view.stride_request, outer},
                        Dimension{"stride_token", view.stride_token, tokens},
                        Dimension{"stride_head", view.stride_head, heads}};
  std::ranges::sort(dimensions, {}, &Dimension::stride);
  int64_t extent = dim;
  for (const Dimension& d : dimensions) {
    if (d.size <= 1) continue;
    if (d.stride < extent)
      fail("{}.{} is {}, which overlaps elements of {}; it must be at least {}", name,
           d.stride_name, d.stride, name, extent);
    extent += (d.size - 1) * d.stride;
  }
}

void check_not_shared(const View& out, std::string_view name, const View& input, DType dtype) {
  const int64_t bytes = element_bytes(dtype);
  const auto* out_begin = static_cast<const std::byte*>(out.data);
  const auto* in_begin = static_cast<const std::byte*>(input.data);
  if (!out_begin || !in_begin) return;
  if (std::less<>{}(out_begin, in_begin + input.elements * bytes) &&
      std::less<>{}(in_begin, out_begin + out.elements * bytes))
    fail("out and {} share memory; out needs a buffer of its own", name);
}

// Prefix sums: from 0, never falling, at most kMaxCount.
void check_cu_seqlens(std::string_view name, const int32_t* cu, int64_t batch) {
  if (cu[0] != 0) fail("{}[0] is {}; it must be 0", name, cu[0]);
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] < cu[b])
      fail("{}[{}] is {}, less than {} before it; it must not fall", name, b + 1, cu[b + 1], cu[b]);
  }
}

void check_thresholds(const TileTest& test, int64_t batch, int64_t heads) {
  if (test.kind < BLASST_TEST_NONE || test.kind > BLASST_TEST_ABSOLUTE)
    fail("test.kind is {}; it must be a blasst_test, 0 to 3", static_cast<int>(test.kind));
  if (test.kind == BLASST_TEST_NONE) {
    if (test.values) fail("test.values is set but test.kind is BLASST_TEST_NONE; choose a test");
    return;
  }
  if (!test.values) fail("test.values is null; test.kind {} needs it", static_cast<int>(test.kind));
  check_range("test.stride_request", test.stride_request, 0, kMaxElements);
  check_range("test.stride_head", test.stride_head, 0, kMaxElements);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const float value = test.values[b * test.stride_request + h * test.stride_head];
      const auto reject = [&](std::string_view what, std::string_view allowed) {
        fail("{} of request {}, head {} is {}; it must be {}", what, b, h, value, allowed);
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

// Fills requests' keys; checks lengths, cu_seqlens, page table, and the K and V views.
void resolve_keys(Problem& p) {
  const KeysValues& kv = p.kv;
  int64_t outer = p.batch, tokens = kv.key_length;
  if (kv.cu_seqlens) {
    if (kv.page_table || kv.lengths)
      fail("kv.cu_seqlens is set together with kv.page_table or kv.lengths; choose one layout");
    check_cu_seqlens("kv.cu_seqlens", kv.cu_seqlens, p.batch);
    for (int64_t b = 0; b < p.batch; ++b) {
      p.requests[b].first_key = kv.cu_seqlens[b];
      p.requests[b].keys = kv.cu_seqlens[b + 1] - kv.cu_seqlens[b];
    }
    outer = 1;
    tokens = kv.cu_seqlens[p.batch];
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
      for (int64_t i = 0; i < ceil_div(keys, kv.page_size); ++i) {
        const int32_t page = kv.page_table[b * kv.page_table_stride + i];
        if (page < 0 || page >= kv.pages)
          fail("kv.page_table[{}, {}] is {}; kv.pages is {}", b, i, page, kv.pages);
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
      check_cu_seqlens("cu_seqlens_q", params.cu_seqlens_q, p.batch);
      for (int64_t b = 0; b < p.batch; ++b) {
        p.requests[b].first_row = params.cu_seqlens_q[b];
        p.requests[b].rows = params.cu_seqlens_q[b + 1] - params.cu_seqlens_q[b];
      }
      outer = 1;
      tokens = params.cu_seqlens_q[p.batch];
      p.rows = tokens;
    }
  } else {
    for (int64_t b = 0; b < p.batch; ++b) p.requests[b] = {b * tokens, tokens, 0, 0};
    p.rows = p.batch * tokens;
  }
  check_view("q", p.q, p.dtype, outer, tokens, p.heads, p.head_dim);
  check_view("out", p.out, p.dtype, outer, tokens, p.heads, p.value_dim);
  if (p.rows > 0) check_no_overlap("out", p.out, outer, tokens, p.heads, p.value_dim);
}

void check_mask(const Problem& p) {
  const Mask& mask = p.mask;
  if (mask.causal != 0 && mask.causal != 1)
    fail("mask.causal is {}; it must be 0 or 1", mask.causal);
  check_range("mask.window_left", mask.window_left, -1, kMaxCount);
  check_range("mask.window_right", mask.window_right, -1, kMaxCount);
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
  if (params.backend != BLASST_BACKEND_CPU) {
    throw Error(BLASST_UNSUPPORTED, fmt::format("backend {} is not in this build; it has: cpu (0)",
                                                int(params.backend)));
  }
  if (params.dtype < BLASST_FLOAT32 || params.dtype > BLASST_BFLOAT16)
    fail("dtype is {}; it must be a blasst_dtype: float32 (0), float16 (1) or bfloat16 (2)",
         static_cast<int>(params.dtype));
  check_range("batch", params.batch, 0, 1 << 20);
  check_range("heads", params.heads, 1, 1 << 20);
  check_range("kv_heads", params.kv_heads, 1, params.heads);
  if (params.heads % params.kv_heads != 0)
    fail("heads is {} and kv_heads is {}; heads must be a multiple of kv_heads", params.heads,
         params.kv_heads);
  check_dim("head_dim", params.head_dim);
  check_dim("value_dim", params.value_dim);
  check_range("query_length", params.query_length, decode ? 1 : 0, decode ? 16 : kMaxCount);
  if (!(params.scale >= 0 && std::isfinite(params.scale)))
    fail("scale is {}; it must be positive and finite, or 0 for 1 / sqrt(head_dim)", params.scale);
  if (!(params.softcap >= 0 && std::isfinite(params.softcap)))
    fail("softcap is {}; it must be positive and finite, or 0 for none", params.softcap);
  if (params.order < BLASST_FORWARD || params.order > BLASST_SINK_FIRST)
    fail("order is {}; it must be a blasst_order: forward (0), reverse (1) or sink_first (2)",
         static_cast<int>(params.order));
  check_range("threads", params.threads, 0, 4096);
  if (!params.workspace && params.workspace_bytes > 0)
    fail("workspace is null but workspace_bytes is {}", params.workspace_bytes);

  Problem p{
      .dtype = params.dtype,
      .pack_heads = decode,
      .batch = params.batch,
      .heads = params.heads,
      .kv_heads = params.kv_heads,
      .head_dim = params.head_dim,
      .value_dim = params.value_dim,
      .requests = std::vector<Request>(params.batch),
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
  check_not_shared(p.out, "q", p.q, p.dtype);
  check_not_shared(p.out, "k", p.kv.k, p.dtype);
  check_not_shared(p.out, "v", p.kv.v, p.dtype);
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

const std::byte* at(const View& view, DType dtype, int64_t outer, int64_t token, int64_t head) {
  return static_cast<const std::byte*>(view.data) +
         element_bytes(dtype) *
             (outer * view.stride_request + token * view.stride_token + head * view.stride_head);
}

const std::byte* kv_row(const Problem& p, const View& view, int64_t request, int64_t token,
                        int64_t head) {
  const KeysValues& kv = p.kv;
  if (kv.cu_seqlens) return at(view, p.dtype, 0, p.requests[request].first_key + token, head);
  if (!kv.page_table) return at(view, p.dtype, request, token, head);
  const int64_t page = kv.page_table[request * kv.page_table_stride + token / kv.page_size];
  return at(view, p.dtype, page, token % kv.page_size, head);
}

}  // namespace

void check_block_mask(const Problem& p, TileShape shape) {
  if (!p.mask.blocks) return;
  const int64_t key_tiles = ceil_div(p.max_keys, shape.keys);
  const int64_t query_tiles = p.query_tile_count(shape.query_rows);
  check_range("mask.blocks_stride_query_tile", p.mask.blocks_stride_query_tile, key_tiles,
              kMaxElements);
  check_range("mask.blocks_stride_head", p.mask.blocks_stride_head,
              query_tiles * p.mask.blocks_stride_query_tile, kMaxElements);
}

Problem make_problem(const PrefillParams& params) { return resolve(params, false); }
Problem make_problem(const DecodeParams& params) { return resolve(params, true); }

const std::byte* Problem::query(int64_t request, int64_t position, int64_t head) const {
  if (ragged_queries) return at(q, dtype, 0, requests[request].first_row + position, head);
  return at(q, dtype, request, position, head);
}

std::byte* Problem::output(int64_t request, int64_t position, int64_t head) const {
  const int64_t outer = ragged_queries ? 0 : request;
  const int64_t token = ragged_queries ? requests[request].first_row + position : position;
  return const_cast<std::byte*>(at(out, dtype, outer, token, head));
}

const std::byte* Problem::key(int64_t request, int64_t token, int64_t kv_head) const {
  return kv_row(*this, kv.k, request, token, kv_head);
}

const std::byte* Problem::value(int64_t request, int64_t token, int64_t kv_head) const {
  return kv_row(*this, kv.v, request, token, kv_head);
}

void Problem::rows_of(const View& view, int64_t request, Range tokens, int64_t kv_head,
                      const std::byte** rows) const {
  const int64_t stride = view.stride_token * element_bytes(dtype);
  for (int64_t token = tokens.begin; token < tokens.end;) {
    const int64_t in_page =
        kv.page_table ? kv.page_size - token % kv.page_size : tokens.end - token;
    const std::byte* row = kv_row(*this, view, request, token, kv_head);
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

double Problem::skip_below(int64_t request, int64_t head) const {
  if (test.kind == BLASST_TEST_NONE) return -std::numeric_limits<double>::infinity();
  const double value = test.values[request * test.stride_request + head * test.stride_head];
  if (test.kind == BLASST_TEST_ABSOLUTE) return value;
  if (test.kind == BLASST_TEST_RELATIVE) return std::log(value);
  return std::log(std::min(1.0, value / static_cast<double>(requests[request].keys)));
}

}  // namespace blasst::attention
