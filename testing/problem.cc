#include "testing/problem.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "problem/element.h"
#include "problem/tiles.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

int64_t longest_keys(const Case& c) {
  int64_t most = 0;
  for (const Lengths& r : c.requests) most = std::max(most, r.keys);
  return most;
}

}  // namespace

void call(const AttentionParams& params, bool decode) {
  decode ? blasst::decode(params) : blasst::prefill(params);
}

Plan plan(const AttentionParams& params, bool decode) {
  return decode ? decode_plan(params) : prefill_plan(params);
}

reference::Result refer(const AttentionParams& params, bool decode, TileShape shape,
                        const std::vector<bool>* kept) {
  return decode ? reference::decode(params, shape, kept) : reference::prefill(params, shape, kept);
}

Access::Access(const AttentionParams& params) : problem_(params.problem) {
  const KeysValues& kv = problem_.kv;
  const bool padded = problem_.query_lengths || kv.starts;
  rows_ = problem_.cu_seqlens_q ? problem_.cu_seqlens_q[problem_.batch]
                                : problem_.batch * problem_.query_length;
  for (int64_t b = 0; b < problem_.batch; ++b) {
    Request r{b * problem_.query_length, problem_.query_length, 0, kv.key_length};
    if (problem_.cu_seqlens_q) {
      r.first_row = problem_.cu_seqlens_q[b];
      r.rows = problem_.cu_seqlens_q[b + 1] - r.first_row;
    }
    if (kv.lengths) r.keys = kv.lengths[b];
    if (kv.starts) r.first_key = kv.starts[b], r.keys -= r.first_key;
    if (kv.cu_seqlens) {
      r.first_key = kv.cu_seqlens[b];
      r.keys = kv.cu_seqlens[b + 1] - r.first_key;
    }
    if (padded) {
      const int64_t used = problem_.query_lengths ? problem_.query_lengths[b] : r.rows;
      const bool ahead = !problem_.mask.causal && problem_.mask.window_right != 0;
      r.rows = ahead ? used : std::min(used, r.keys);
      r.first_row += used - r.rows;
    }
    requests_.push_back(r);
    max_keys_ = std::max(max_keys_, r.keys);
  }
}

std::byte* Access::row_of(const View& view, int64_t outer, int64_t token, int64_t head) const {
  return static_cast<std::byte*>(view.data) +
         element_bytes(view.dtype) *
             (outer * view.stride_request + token * view.stride_token + head * view.stride_head);
}

std::byte* Access::query_row(const View& view, int64_t request, int64_t position,
                             int64_t head) const {
  return row_at(view, requests_[request].first_row + position, head);
}

std::byte* Access::row_at(const View& view, int64_t row, int64_t head) const {
  if (problem_.cu_seqlens_q) return row_of(view, 0, row, head);
  return row_of(view, row / problem_.query_length, row % problem_.query_length, head);
}

std::byte* Access::query(int64_t request, int64_t position, int64_t head) const {
  return query_row(problem_.q, request, position, head);
}

std::byte* Access::output(int64_t request, int64_t position, int64_t head) const {
  return query_row(problem_.out, request, position, head);
}

std::byte* Access::key_row(const View& view, int64_t request, int64_t token,
                           int64_t kv_head) const {
  const KeysValues& kv = problem_.kv;
  token += requests_[request].first_key;
  if (kv.cu_seqlens) return row_of(view, 0, token, kv_head);
  if (!kv.page_table) return row_of(view, request, token, kv_head);
  return row_of(view, kv.page_table[request * kv.page_table_stride + token / kv.page_size],
                token % kv.page_size, kv_head);
}

std::byte* Access::key(int64_t request, int64_t token, int64_t kv_head) const {
  return key_row(problem_.kv.k, request, token, kv_head);
}

std::byte* Access::value(int64_t request, int64_t token, int64_t kv_head) const {
  return key_row(problem_.kv.v, request, token, kv_head);
}

namespace {

float scale_at(const Scales& scales, int64_t request, int64_t kv_head) {
  if (!scales.values) return 1;
  return scales.values[request * scales.stride_request + kv_head * scales.stride_head];
}

}  // namespace

float Access::key_scale(int64_t request, int64_t kv_head) const {
  return scale_at(problem_.k_scales, request, kv_head);
}

float Access::value_scale(int64_t request, int64_t kv_head) const {
  return scale_at(problem_.v_scales, request, kv_head);
}

bool Access::sees(int64_t request, int64_t position, int64_t head, int64_t key) const {
  const Request& r = requests_[request];
  const int64_t distance = position + r.keys - r.rows - key;
  const Mask& mask = problem_.mask;
  if (key < 0 || key >= r.keys) return false;
  if (mask.causal && distance < 0) return false;
  if (mask.window_left >= 0 && distance > mask.window_left) return false;
  if (mask.window_right >= 0 && -distance > mask.window_right) return false;
  return !mask.bands || (distance >= mask.bands[2 * head] && distance <= mask.bands[2 * head + 1]);
}

Problem::Problem(const Case& c) : description(c) {
  params.execution.backend = BLASST_BACKEND_CPU;
  params.problem.batch = std::ssize(c.requests);
  params.problem.heads = c.heads;
  params.problem.kv_heads = c.kv_heads;
  params.problem.head_dim = c.head_dim;
  params.problem.value_dim = c.value_dim;
  params.problem.scale = c.scale;
  params.problem.softcap = c.softcap;
  // Which say what rows of a padded batch are padding.
  params.problem.mask.causal = c.causal;
  params.problem.mask.window_right = c.window_right;
  params.decision.order = c.order;
  params.execution.threads = c.threads;
  lay_out_queries();
  lay_out_keys();
  fill();
  set_mask();
  set_thresholds();
  set_report();
  params.decision.scores = c.scores;  // on which no plan above depends
}

View Problem::allocate(std::vector<std::byte>& buffer, DType dtype, int64_t outer, int64_t tokens,
                       int64_t heads, int64_t dim) {
  const int64_t row = dim + description.padding;
  const int64_t elements = outer * tokens * heads * row;
  const int64_t bytes = element_bytes(dtype);
  buffer.assign((elements + description.padding) * bytes,
                dtype == BLASST_INT8 ? std::byte{0x80} : kUnused);
  View view{.data = buffer.data() + description.padding * bytes,
            .dtype = dtype,
            .elements = elements,
            .stride_request = tokens * heads * row,
            .stride_token = heads * row,
            .stride_head = row};
  if (description.head_major) view.stride_token = row, view.stride_head = tokens * row;
  return view;
}

void Problem::lay_out_queries() {
  const auto& requests = description.requests;
  int64_t longest = description.decode || requests.empty() ? 1 : 0;
  for (const Lengths& r : requests) longest = std::max(longest, r.queries);
  int64_t outer = params.problem.batch, tokens = longest;
  if (description.ragged_queries) {
    cu_queries = {0};
    for (const Lengths& r : requests)
      cu_queries.push_back(cu_queries.back() + static_cast<int32_t>(r.queries));
    params.problem.query_layout = BLASST_LAYOUT_RAGGED;
    params.problem.query_length = longest;
    params.problem.rows = cu_queries.back();
    params.problem.cu_seqlens_q = cu_queries.data();
    outer = 1, tokens = cu_queries.back();
  } else {
    if (description.padded) {
      for (const Lengths& r : requests) query_lengths.push_back(static_cast<int32_t>(r.queries));
      params.problem.query_lengths = query_lengths.data();
    } else if (std::ranges::any_of(requests,
                                   [&](const Lengths& r) { return r.queries != longest; })) {
      throw std::logic_error("dense queries need as many in every request");
    }
    params.problem.query_length = longest;
  }
  const DType dtype = description.dtype;
  params.problem.q =
      allocate(q_, dtype, outer, tokens, params.problem.heads, params.problem.head_dim);
  params.problem.out =
      allocate(out_, dtype, outer, tokens, params.problem.heads, params.problem.value_dim);
}

void Problem::lay_out_keys() {
  KeysValues& kv = params.problem.kv;
  const int64_t most = longest_keys(description);
  // Said or not, the longest request is as long.
  if (description.layout != Layout::kDense && description.seed % 2) kv.key_length = most;
  int64_t outer = params.problem.batch, tokens = 0;
  lengths.clear(), cu_keys = {0};
  for (const Lengths& r : description.requests) {
    lengths.push_back(static_cast<int32_t>(r.keys));
    cu_keys.push_back(cu_keys.back() + static_cast<int32_t>(r.keys));
  }
  switch (description.layout) {
    case Layout::kDense:
      for (size_t b = 0; description.padded && b < lengths.size(); ++b) {
        starts.push_back(static_cast<int32_t>(hash(description.seed, 106, b) % 100));
        lengths[b] += starts[b];
        tokens = std::max<int64_t>(tokens, lengths[b]);
      }
      if (description.padded) kv.starts = starts.data();
      kv.lengths = lengths.data();
      tokens = std::max(most, tokens) + description.padding;  // a cache not yet full
      kv.key_length = tokens;
      break;
    case Layout::kRagged:
      kv.layout = BLASST_LAYOUT_RAGGED;
      kv.tokens = cu_keys.back();
      kv.cu_seqlens = cu_keys.data();
      outer = 1, tokens = cu_keys.back();
      break;
    case Layout::kPaged: {
      const int64_t size = description.page_size;
      kv.layout = BLASST_LAYOUT_PAGED;
      kv.page_size = size;
      kv.page_table_stride = problem::ceil_div(most, size) + 1;  // the spare entries stay -1
      page_table.assign(params.problem.batch * kv.page_table_stride, -1);
      int64_t used = 0;
      for (const int32_t length : lengths) used += problem::ceil_div(length, size);
      kv.pages = used + 2;
      // Any permutation: a stride that shares no factor with the number of pages.
      int64_t step = kv.pages / 2 + 1;
      while (std::gcd(step, kv.pages) != 1) ++step;
      int64_t page = 0;
      for (int64_t b = 0; b < params.problem.batch; ++b) {
        for (int64_t i = 0; i < problem::ceil_div(lengths[b], size); ++i)
          page_table[b * kv.page_table_stride + i] =
              static_cast<int32_t>((page = (page + step) % kv.pages));
      }
      kv.page_table = page_table.data();
      kv.lengths = lengths.data();
      outer = kv.pages, tokens = size;
    }
  }
  const DType k_dtype = description.k_dtype.value_or(description.dtype);
  const DType v_dtype = description.v_dtype.value_or(description.dtype);
  if (description.values_in_keys && k_dtype != v_dtype)
    throw std::logic_error("values that lie in keys are of their type");
  kv.k = allocate(k_, k_dtype, outer, tokens, params.problem.kv_heads, params.problem.head_dim);
  kv.v = description.values_in_keys ? kv.k
                                    : allocate(v_, v_dtype, outer, tokens, params.problem.kv_heads,
                                               params.problem.value_dim);
  params.problem.k_scales = make_scales(k_scales, k_dtype, 107);
  params.problem.v_scales = make_scales(v_scales, v_dtype, 108);
}

// With which the numbers, 16 at most but for a few, use half of what 8 bits have or more.
Scales Problem::make_scales(std::vector<float>& values, DType dtype, uint64_t part) const {
  if (!problem::is_8_bits(dtype)) return {};
  const Case& c = description;
  const int64_t heads = c.scales_per_head ? c.kv_heads : 1;
  const int64_t requests = c.scales_per_request ? std::ssize(c.requests) : 1;
  const double largest = dtype == BLASST_INT8 ? 127 : 448;
  for (int64_t i = 0; i < std::max<int64_t>(requests, 1) * heads; ++i) {
    const double scale = 16 / largest * (1 + uniform(hash(description.seed, part, i)));
    values.push_back(
        static_cast<float>(c.scales_are_powers ? std::exp2(std::ceil(std::log2(scale))) : scale));
  }
  return {.values = values.data(),
          .stride_request = c.scales_per_request ? heads : 0,
          .stride_head = c.scales_per_head ? 1 : 0};
}

void Problem::fill() {
  const TileShape shape = plan(params, description.decode).shape;
  const Numbers numbers{.inputs = description.inputs,
                        .seed = description.seed,
                        .group = params.problem.heads / params.problem.kv_heads,
                        .block_rows = std::max<int64_t>(
                            description.block_rows ? description.block_rows : shape.query_rows, 1),
                        .block_keys = description.block_keys ? description.block_keys : shape.keys,
                        .density = description.density};
  const Access access(params);
  std::vector<float> row;
  const auto store = [&](DType dtype, std::byte* address, float scale) {
    for (size_t i = 0; i < row.size(); ++i)
      store_element(dtype, address + i * element_bytes(dtype), row[i] / scale);
  };
  const KeysValues& kv = params.problem.kv;
  for (int64_t b = 0; b < params.problem.batch; ++b) {
    for (int64_t i = 0; i < access.requests()[b].rows; ++i) {
      for (int64_t h = 0; h < params.problem.heads; ++h) {
        row.resize(params.problem.head_dim);
        numbers.query(b, i, h, row);
        store(description.dtype, access.query(b, i, h), 1);
      }
    }
    for (int64_t j = 0; j < access.requests()[b].keys; ++j) {
      for (int64_t h = 0; h < params.problem.kv_heads; ++h) {
        row.resize(params.problem.head_dim);
        numbers.key(b, j, h, row);
        store(kv.k.dtype, access.key(b, j, h), access.key_scale(b, h));
        if (description.values_in_keys) continue;
        row.resize(params.problem.value_dim);
        numbers.value(b, j, h, row);
        store(kv.v.dtype, access.value(b, j, h), access.value_scale(b, h));
      }
    }
  }
  if (description.sinks) {
    for (int64_t h = 0; h < params.problem.heads; ++h)
      sinks.push_back(static_cast<float>(8 * uniform(hash(description.seed, 100, h)) - 4));
    params.problem.sinks = sinks.data();
  }
}

void Problem::set_mask() {
  Mask& mask = params.problem.mask;
  mask.window_left = description.window_left;
  mask.window_right = description.window_right;
  if (description.bands) {
    for (int64_t h = 0; h < params.problem.heads; ++h) {
      const uint64_t bits = hash(description.seed, 101, h);
      const auto first = static_cast<int64_t>(bits % 100) - 20;
      bands.insert(bands.end(), {first, first + static_cast<int64_t>(bits >> 32) % 400});
    }
    mask.bands = bands.data();
  }
  if (description.blocks) {
    const Plan tiles = plan(params, description.decode);
    mask.blocks_stride_query_tile = tiles.key_tiles + description.padding;
    mask.blocks_stride_head =
        tiles.query_tiles * mask.blocks_stride_query_tile + description.padding % 7;
    for (int64_t i = 0; i < tiles.tile_heads * mask.blocks_stride_head; ++i)
      blocks.push_back(hash(description.seed, 102, i) % 5 < 3);
    blocks.push_back(0);  // never an empty buffer, so never a null pointer
    mask.blocks = blocks.data();
  }
}

void Problem::set_thresholds() {
  TileTest& test = params.decision.test;
  test.kind = description.test;
  if (test.kind == BLASST_TEST_NONE) return;
  test.places = description.places;
  test.stride_place = test.places > 1 ? 1 : 0;
  test.stride_head = description.per_head ? test.places : 0;
  const int64_t of_request = (description.per_head ? params.problem.heads : 1) * test.places;
  test.stride_request = description.per_request ? of_request : 0;
  const int64_t count = (description.per_request ? params.problem.batch : 1) * of_request;
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
  const Plan tiles = plan(params, description.decode);
  const int64_t all = tiles.tile_heads * tiles.query_tiles;
  lse.resize(params.problem.heads * access.rows());
  dropped_mass_bound.resize(lse.size());
  tiles_visitable.resize(params.problem.batch * params.problem.heads);
  tiles_skipped.resize(tiles_visitable.size());
  tile_bits.resize(all * tiles.tile_words);
  gap_histogram.resize(params.problem.heads * BLASST_GAP_BINS);
  const auto spare = static_cast<int64_t>(description.seed % 3);
  const int64_t maxima_stride = tiles.key_tiles + spare;
  tile_maxima.resize(all * maxima_stride);
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
    return std::ranges::any_of(buffer, [&](auto x) { return x != static_cast<decltype(x)>(mark); });
  };
  return written(out_, kUnused) || written(lse, kMark) || written(dropped_mass_bound, kMark) ||
         written(tiles_visitable, kMark) || written(tiles_skipped, kMark) ||
         written(tile_bits, kMark) || written(gap_histogram, kMark) || written(tile_maxima, kMark);
}

std::vector<std::byte> Problem::out_bits() const {
  const Access access(params);
  const int64_t row_bytes = params.problem.value_dim * element_bytes(description.dtype);
  std::vector<std::byte> bits;
  for (int64_t row = 0; row < access.rows(); ++row) {
    for (int64_t h = 0; h < params.problem.heads; ++h) {
      const std::byte* address = access.row_at(params.problem.out, row, h);
      bits.insert(bits.end(), address, address + row_bytes);
    }
  }
  return bits;
}

std::vector<float> Problem::out() const {
  const std::vector<std::byte> bits = out_bits();
  std::vector<float> values;
  for (size_t at = 0; at < bits.size(); at += element_bytes(description.dtype))
    values.push_back(static_cast<float>(load_element(description.dtype, bits.data() + at)));
  return values;
}

bool Problem::wrote_elsewhere() const {
  const Access access(params);
  std::vector<std::byte> rest = out_;
  const int64_t row_bytes = params.problem.value_dim * element_bytes(description.dtype);
  for (int64_t row = 0; row < access.rows(); ++row) {
    for (int64_t h = 0; h < params.problem.heads; ++h)
      std::fill_n(rest.data() + (access.row_at(params.problem.out, row, h) - out_.data()),
                  row_bytes, kUnused);
  }
  return std::ranges::any_of(rest, [](std::byte x) { return x != kUnused; });
}

}  // namespace blasst::check
