#include "check/problem.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "check/element.h"

namespace blasst::check {
namespace {

constexpr std::byte kUnused{0xff};  // NaN in every type
constexpr int kMark = 12345;        // no call writes this

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

DecodeParams as_decode(const PrefillParams& p) {
  return {.backend = p.backend,
          .dtype = p.dtype,
          .batch = p.batch,
          .heads = p.heads,
          .kv_heads = p.kv_heads,
          .head_dim = p.head_dim,
          .value_dim = p.value_dim,
          .query_length = p.query_length,
          .q = p.q,
          .out = p.out,
          .kv = p.kv,
          .scale = p.scale,
          .softcap = p.softcap,
          .sinks = p.sinks,
          .mask = p.mask,
          .order = p.order,
          .test = p.test,
          .report = p.report,
          .threads = p.threads,
          .workspace = p.workspace,
          .workspace_bytes = p.workspace_bytes,
          .stream = p.stream};
}

void call(const PrefillParams& params, bool decode) {
  decode ? blasst::decode(as_decode(params)) : blasst::prefill(params);
}

TileShape tile_shape(const PrefillParams& params, bool decode) {
  return decode ? blasst::tile_shape(as_decode(params)) : blasst::tile_shape(params);
}

size_t workspace_bytes(const PrefillParams& params, bool decode) {
  return decode ? blasst::workspace_bytes(as_decode(params)) : blasst::workspace_bytes(params);
}

reference::Result refer(const PrefillParams& params, bool decode, TileShape shape,
                        const std::vector<bool>* kept) {
  return decode ? reference::decode(as_decode(params), shape, kept)
                : reference::prefill(params, shape, kept);
}

Access::Access(const PrefillParams& params) : params_(params) {
  const KeysValues& kv = params.kv;
  for (int64_t b = 0; b < params.batch; ++b) {
    Request r{b * params.query_length, params.query_length, 0, kv.key_length};
    if (params.cu_seqlens_q) {
      r.first_row = params.cu_seqlens_q[b];
      r.rows = params.cu_seqlens_q[b + 1] - r.first_row;
    }
    if (kv.lengths) r.keys = kv.lengths[b];
    if (kv.cu_seqlens) {
      r.first_key = kv.cu_seqlens[b];
      r.keys = kv.cu_seqlens[b + 1] - r.first_key;
    }
    requests_.push_back(r);
    rows_ += r.rows;
    max_keys_ = std::max(max_keys_, r.keys);
  }
}

std::byte* Access::row_of(const View& view, int64_t outer, int64_t token, int64_t head) const {
  return static_cast<std::byte*>(view.data) +
         element_bytes(params_.dtype) *
             (outer * view.stride_request + token * view.stride_token + head * view.stride_head);
}

std::byte* Access::query_row(const View& view, int64_t request, int64_t position,
                             int64_t head) const {
  if (!params_.cu_seqlens_q) return row_of(view, request, position, head);
  return row_of(view, 0, requests_[request].first_row + position, head);
}

std::byte* Access::query(int64_t request, int64_t position, int64_t head) const {
  return query_row(params_.q, request, position, head);
}

std::byte* Access::output(int64_t request, int64_t position, int64_t head) const {
  return query_row(params_.out, request, position, head);
}

std::byte* Access::key_row(const View& view, int64_t request, int64_t token,
                           int64_t kv_head) const {
  const KeysValues& kv = params_.kv;
  if (kv.cu_seqlens) return row_of(view, 0, requests_[request].first_key + token, kv_head);
  if (!kv.page_table) return row_of(view, request, token, kv_head);
  return row_of(view, kv.page_table[request * kv.page_table_stride + token / kv.page_size],
                token % kv.page_size, kv_head);
}

std::byte* Access::key(int64_t request, int64_t token, int64_t kv_head) const {
  return key_row(params_.kv.k, request, token, kv_head);
}

std::byte* Access::value(int64_t request, int64_t token, int64_t kv_head) const {
  return key_row(params_.kv.v, request, token, kv_head);
}

bool Access::sees(int64_t request, int64_t position, int64_t head, int64_t key) const {
  const Request& r = requests_[request];
  const int64_t distance = position + r.keys - r.rows - key;
  const Mask& mask = params_.mask;
  if (key < 0 || key >= r.keys) return false;
  if (mask.causal && distance < 0) return false;
  if (mask.window_left >= 0 && distance > mask.window_left) return false;
  if (mask.window_right >= 0 && -distance > mask.window_right) return false;
  return !mask.bands || (distance >= mask.bands[2 * head] && distance <= mask.bands[2 * head + 1]);
}

Problem::Problem(const Case& c) : description(c) {
  params.dtype = c.dtype;
  params.batch = std::ssize(c.requests);
  params.heads = c.heads;
  params.kv_heads = c.kv_heads;
  params.head_dim = c.head_dim;
  params.value_dim = c.value_dim;
  params.scale = c.scale;
  params.softcap = c.softcap;
  params.order = c.order;
  params.threads = c.threads;
  lay_out_queries();
  lay_out_keys();
  fill();
  set_mask();
  set_thresholds();
  set_report();
}

View Problem::allocate(std::vector<std::byte>& buffer, int64_t outer, int64_t tokens, int64_t heads,
                       int64_t dim) {
  const int64_t row = dim + description.padding;
  const int64_t elements = outer * tokens * heads * row;
  const int64_t bytes = element_bytes(params.dtype);
  buffer.assign((elements + description.padding) * bytes, kUnused);
  View view{buffer.data() + description.padding * bytes, elements, tokens * heads * row,
            heads * row, row};
  if (description.head_major) view.stride_token = row, view.stride_head = tokens * row;
  return view;
}

void Problem::lay_out_queries() {
  const auto& requests = description.requests;
  const int64_t longest = requests.empty() ? 1 : requests[0].queries;
  int64_t outer = params.batch, tokens = longest;
  if (description.ragged_queries) {
    cu_queries = {0};
    for (const Lengths& r : requests)
      cu_queries.push_back(cu_queries.back() + static_cast<int32_t>(r.queries));
    params.cu_seqlens_q = cu_queries.data();
    outer = 1, tokens = cu_queries.back();
  } else {
    if (std::ranges::any_of(requests, [&](const Lengths& r) { return r.queries != longest; }))
      throw std::logic_error("dense queries need as many in every request");
    params.query_length = longest;
  }
  params.q = allocate(q_, outer, tokens, params.heads, params.head_dim);
  params.out = allocate(out_, outer, tokens, params.heads, params.value_dim);
}

void Problem::lay_out_keys() {
  KeysValues& kv = params.kv;
  int64_t outer = params.batch, tokens = 0;
  lengths.clear(), cu_keys = {0};
  for (const Lengths& r : description.requests) {
    lengths.push_back(static_cast<int32_t>(r.keys));
    cu_keys.push_back(cu_keys.back() + static_cast<int32_t>(r.keys));
    tokens = std::max(tokens, r.keys);
  }
  switch (description.layout) {
    case Layout::kDense:
      kv.lengths = lengths.data();
      tokens += description.padding;  // a cache not yet full
      kv.key_length = tokens;
      break;
    case Layout::kRagged:
      kv.cu_seqlens = cu_keys.data();
      outer = 1, tokens = cu_keys.back();
      break;
    case Layout::kPaged: {
      const int64_t size = description.page_size;
      kv.page_size = size;
      kv.page_table_stride = ceil_div(tokens, size) + 1;  // the spare entries stay -1
      page_table.assign(params.batch * kv.page_table_stride, -1);
      int64_t used = 0;
      for (const int32_t length : lengths) used += ceil_div(length, size);
      kv.pages = used + 2;
      // Any permutation: a stride that shares no factor with the number of pages.
      int64_t step = kv.pages / 2 + 1;
      while (std::gcd(step, kv.pages) != 1) ++step;
      int64_t page = 0;
      for (int64_t b = 0; b < params.batch; ++b) {
        for (int64_t i = 0; i < ceil_div(lengths[b], size); ++i)
          page_table[b * kv.page_table_stride + i] =
              static_cast<int32_t>((page = (page + step) % kv.pages));
      }
      kv.page_table = page_table.data();
      kv.lengths = lengths.data();
      outer = kv.pages, tokens = size;
    }
  }
  kv.k = allocate(k_, outer, tokens, params.kv_heads, params.head_dim);
  kv.v = allocate(v_, outer, tokens, params.kv_heads, params.value_dim);
}

void Problem::fill() {
  const TileShape shape = tile_shape(params, description.decode);
  const Numbers numbers{.inputs = description.inputs,
                        .seed = description.seed,
                        .group = params.heads / params.kv_heads,
                        .block_rows = std::max<int64_t>(
                            description.block_rows ? description.block_rows : shape.query_rows, 1),
                        .block_keys = description.block_keys ? description.block_keys : shape.keys,
                        .density = description.density};
  const Access access(params);
  std::vector<float> row;
  const auto store = [&](std::byte* address) {
    for (size_t i = 0; i < row.size(); ++i)
      store_element(params.dtype, address + i * element_bytes(params.dtype), row[i]);
  };
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t i = 0; i < access.requests()[b].rows; ++i) {
      for (int64_t h = 0; h < params.heads; ++h) {
        row.resize(params.head_dim);
        numbers.query(b, i, h, row);
        store(access.query(b, i, h));
      }
    }
    for (int64_t j = 0; j < access.requests()[b].keys; ++j) {
      for (int64_t h = 0; h < params.kv_heads; ++h) {
        row.resize(params.head_dim);
        numbers.key(b, j, h, row);
        store(access.key(b, j, h));
        row.resize(params.value_dim);
        numbers.value(b, j, h, row);
        store(access.value(b, j, h));
      }
    }
  }
  if (description.sinks) {
    for (int64_t h = 0; h < params.heads; ++h)
      sinks.push_back(static_cast<float>(8 * uniform(hash(description.seed, 100, h)) - 4));
    params.sinks = sinks.data();
  }
}

void Problem::set_mask() {
  Mask& mask = params.mask;
  const Access access(params);
  mask.causal = description.causal;
  mask.window_left = description.window_left;
  mask.window_right = description.window_right;
  if (description.bands) {
    for (int64_t h = 0; h < params.heads; ++h) {
      const uint64_t bits = hash(description.seed, 101, h);
      const auto first = static_cast<int64_t>(bits % 100) - 20;
      bands.insert(bands.end(), {first, first + static_cast<int64_t>(bits >> 32) % 400});
    }
    mask.bands = bands.data();
  }
  if (description.blocks) {
    const TileShape shape = tile_shape(params, description.decode);
    int64_t query_tiles = description.decode ? params.batch : 0;
    if (!description.decode)
      for (const auto& r : access.requests()) query_tiles += ceil_div(r.rows, shape.query_rows);
    mask.blocks_stride_query_tile = ceil_div(access.max_keys(), shape.keys) + description.padding;
    mask.blocks_stride_head = query_tiles * mask.blocks_stride_query_tile;
    const int64_t heads = description.decode ? params.kv_heads : params.heads;
    for (int64_t i = 0; i < heads * mask.blocks_stride_head; ++i)
      blocks.push_back(hash(description.seed, 102, i) % 5 < 3);
    blocks.push_back(0);  // never an empty buffer, so never a null pointer
    mask.blocks = blocks.data();
  }
}

void Problem::set_thresholds() {
  TileTest& test = params.test;
  test.kind = description.test;
  if (test.kind == BLASST_TEST_NONE) return;
  test.places = description.places;
  test.stride_place = test.places > 1 ? 1 : 0;
  test.stride_head = description.per_head ? test.places : 0;
  const int64_t of_request = (description.per_head ? params.heads : 1) * test.places;
  test.stride_request = description.per_request ? of_request : 0;
  const int64_t count = (description.per_request ? params.batch : 1) * of_request;
  for (int64_t i = 0; i < std::max<int64_t>(count, 1); ++i) {
    const auto share = static_cast<float>(uniform(hash(description.seed, 103, i)));
    thresholds.push_back(count == 1                          ? description.threshold
                         : test.kind == BLASST_TEST_ABSOLUTE ? description.threshold - 4 * share
                                                             : description.threshold * share);
  }
  test.values = thresholds.data();
}

void Problem::set_report() {
  const Access access(params);
  const TileShape shape = tile_shape(params, description.decode);
  int64_t query_tiles = params.batch;
  if (!description.decode) {
    query_tiles = 0;
    for (const auto& r : access.requests()) query_tiles += ceil_div(r.rows, shape.query_rows);
  }
  const int64_t bit_heads = description.decode ? params.kv_heads : params.heads;
  const int64_t words = ceil_div(ceil_div(access.max_keys(), shape.keys), 32);
  lse.resize(params.heads * access.rows());
  dropped_mass_bound.resize(lse.size());
  tiles_visitable.resize(params.batch * params.heads);
  tiles_skipped.resize(tiles_visitable.size());
  tile_bits.resize(bit_heads * query_tiles * words);
  gap_histogram.resize(params.heads * BLASST_GAP_BINS);
  const auto spare = static_cast<int64_t>(description.seed % 3);
  const int64_t maxima_stride = ceil_div(access.max_keys(), shape.keys) + spare;
  tile_maxima.resize(bit_heads * query_tiles * maxima_stride);
  params.report = {.lse = lse.data(),
                   .dropped_mass_bound = dropped_mass_bound.data(),
                   .tiles_visitable = tiles_visitable.data(),
                   .tiles_skipped = tiles_skipped.data(),
                   .tile_bits = tile_bits.data(),
                   .gap_histogram = gap_histogram.data(),
                   .tile_maxima = tile_maxima.data(),
                   .tile_maxima_stride = maxima_stride};
}

void Problem::run() {
  mark_outputs();
  call(params, description.decode);
}

void Problem::mark_outputs() {
  std::ranges::fill(out_, kUnused);
  std::ranges::fill(lse, kMark);
  std::ranges::fill(dropped_mass_bound, kMark);
  std::ranges::fill(tiles_visitable, kMark);
  std::ranges::fill(tiles_skipped, kMark);
  std::ranges::fill(tile_bits, kMark);
  std::ranges::fill(gap_histogram, kMark);
  std::ranges::fill(tile_maxima, kMark);
}

bool Problem::wrote_anything() const {
  const auto written = [](const auto& buffer, auto mark) {
    return std::ranges::any_of(buffer, [&](auto x) { return x != mark; });
  };
  return written(out_, kUnused) || written(lse, kMark) || written(dropped_mass_bound, kMark) ||
         written(tiles_visitable, kMark) || written(tiles_skipped, kMark) ||
         written(tile_bits, kMark) || written(gap_histogram, kMark) || written(tile_maxima, kMark);
}

std::vector<std::byte> Problem::out_bits() const {
  const Access access(params);
  const int64_t row_bytes = params.value_dim * element_bytes(params.dtype);
  std::vector<std::byte> bits;
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t i = 0; i < access.requests()[b].rows; ++i) {
      for (int64_t h = 0; h < params.heads; ++h) {
        const std::byte* row = access.output(b, i, h);
        bits.insert(bits.end(), row, row + row_bytes);
      }
    }
  }
  return bits;
}

std::vector<float> Problem::out() const {
  const std::vector<std::byte> bits = out_bits();
  std::vector<float> values;
  for (size_t at = 0; at < bits.size(); at += element_bytes(params.dtype))
    values.push_back(static_cast<float>(load_element(params.dtype, bits.data() + at)));
  return values;
}

bool Problem::wrote_elsewhere() const {
  const Access access(params);
  std::vector<std::byte> rest = out_;
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t i = 0; i < access.requests()[b].rows; ++i) {
      for (int64_t h = 0; h < params.heads; ++h) {
        std::byte* row = rest.data() + (access.output(b, i, h) - out_.data());
        std::fill_n(row, params.value_dim * element_bytes(params.dtype), kUnused);
      }
    }
  }
  return std::ranges::any_of(rest, [](std::byte x) { return x != kUnused; });
}

}  // namespace blasst::check
