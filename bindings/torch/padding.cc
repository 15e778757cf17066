#include "padding.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>

namespace blasst::binding {
namespace {

constexpr float kNoKey = -std::numeric_limits<float>::infinity();

template <typename Params>
int64_t key_length(const Params& p, int64_t request) {
  return p.kv.lengths ? p.kv.lengths[request] : p.kv.key_length;
}

// What a padded batch computes of one request. Its rows end where the rows in use do.
struct Part {
  int64_t request;
  int64_t start, keys;  // first key, number of keys
  int64_t first, rows;  // the same of rows
};

template <typename Params>
std::vector<Part> parts_of(const Params& batch, const Padding& padding) {
  std::vector<Part> parts;
  for (int64_t b = 0; b < batch.batch; ++b) {
    const int64_t start = padding.start(b), keys = key_length(batch, b) - start;
    const int64_t used = padding.rows(b, batch.query_length);
    const int64_t rows = batch.mask.causal ? std::min(used, keys) : used;
    parts.push_back({b, start, keys, used - rows, rows});
  }
  return parts;
}

View from(const View& view, int64_t offset, DType dtype) {
  View rest = view;
  rest.elements = std::max<int64_t>(0, view.elements - offset);
  if (rest.elements > 0)
    rest.data = static_cast<std::byte*>(view.data) + offset * element_bytes(dtype);
  return rest;
}

View rows_of(const View& view, const Part& part, DType dtype) {
  return from(view, part.request * view.stride_request + part.first * view.stride_token, dtype);
}

View keys_of(const View& view, const Part& part, DType dtype) {
  return from(view, part.request * view.stride_request + part.start * view.stride_token, dtype);
}

// The part as a call of its own, without a report.
template <typename Params>
Params call_of(const Params& batch, const Part& part) {
  Params p = batch;
  p.batch = 1;
  p.query_length = part.rows;
  p.q = rows_of(p.q, part, p.dtype);
  p.out = rows_of(p.out, part, p.dtype);
  if (p.kv.page_table) {
    p.kv.page_table += part.request * p.kv.page_table_stride;
    p.kv.lengths += part.request;
  } else {
    p.kv.k = keys_of(p.kv.k, part, p.dtype);
    p.kv.v = keys_of(p.kv.v, part, p.dtype);
    p.kv.key_length = part.keys;
    p.kv.lengths = nullptr;
  }
  if (p.test.values) p.test.values += part.request * p.test.stride_request;
  p.report = {};
  return p;
}

// Sets tokens of each request to 0, and nothing that lies between them.
void clear(const View& view, DType dtype, int64_t requests, int64_t tokens, int64_t heads,
           int64_t dim) {
  const int64_t bytes = element_bytes(dtype);
  auto* data = static_cast<std::byte*>(view.data);
  for (int64_t b = 0; b < requests; ++b)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h)
        std::memset(
            data + bytes * (b * view.stride_request + t * view.stride_token + h * view.stride_head),
            0, bytes * dim);
}

// Of [heads, rows of the batch], where a request's rows of a head begin.
template <typename Params>
int64_t head_row(const Params& batch, int64_t request, int64_t head) {
  return (head * batch.batch + request) * batch.query_length;
}

void call(const PrefillParams& p) { prefill(p); }
void call(const DecodeParams& p) { decode(p); }

// What the report says of rows and tiles that no part computes.
template <typename Params>
void clear_report(const Params& batch) {
  const Report& report = batch.report;
  const int64_t rows = batch.batch * batch.query_length;
  if (report.lse) std::fill_n(report.lse, batch.heads * rows, kNoKey);
  if (report.dropped_mass_bound) std::fill_n(report.dropped_mass_bound, batch.heads * rows, 0.0f);
  if (report.tiles_visitable) std::fill_n(report.tiles_visitable, batch.batch * batch.heads, 0);
  if (report.tiles_skipped) std::fill_n(report.tiles_skipped, batch.batch * batch.heads, 0);
  if (report.gap_histogram) std::fill_n(report.gap_histogram, batch.heads * BLASST_GAP_BINS, 0);
}

template <typename Params>
void run_parts(const Params& batch, const Padding& padding, int64_t bit_words) {
  clear(batch.out, batch.dtype, batch.batch, batch.query_length, batch.heads, batch.value_dim);
  clear_report(batch);
  const Report& report = batch.report;
  std::vector<float> lse, bound;
  std::vector<uint64_t> gaps;
  for (const Part& part : parts_of(batch, padding)) {
    for (int64_t h = 0; report.lse && batch.sinks && h < batch.heads; ++h)
      std::fill_n(report.lse + head_row(batch, part.request, h), part.first, batch.sinks[h]);
    if (part.rows == 0) continue;
    Params p = call_of(batch, part);
    if (report.tiles_visitable) {
      p.report.tiles_visitable = report.tiles_visitable + part.request * p.heads;
      p.report.tiles_skipped = report.tiles_skipped + part.request * p.heads;
    }
    lse.resize(report.lse ? p.heads * part.rows : 0);
    bound.resize(report.dropped_mass_bound ? p.heads * part.rows : 0);
    gaps.resize(report.gap_histogram ? p.heads * BLASST_GAP_BINS : 0);
    if (report.lse) p.report.lse = lse.data();
    if (report.dropped_mass_bound) p.report.dropped_mass_bound = bound.data();
    if (report.gap_histogram) p.report.gap_histogram = gaps.data();
    if (report.tile_bits)
      p.report.tile_bits = report.tile_bits + part.request * (bit_words / batch.batch);
    call(p);
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t to = head_row(batch, part.request, h) + part.first;
      if (report.lse) std::copy_n(&lse[h * part.rows], part.rows, report.lse + to);
      if (report.dropped_mass_bound)
        std::copy_n(&bound[h * part.rows], part.rows, report.dropped_mass_bound + to);
    }
    for (size_t i = 0; i < gaps.size(); ++i) report.gap_histogram[i] += gaps[i];
  }
}

}  // namespace

template <typename Params>
Padding::Padding(const Params& p, Arguments& a)
    : starts_(indices("starts", a.starts, "[batch]", {p.batch})),
      query_lengths_(indices("query_lengths", a.query_lengths, "[batch]", {p.batch})) {
  for (int64_t b = 0; b < p.batch && (starts_ || query_lengths_); ++b) {
    const int64_t first = start(b), end = key_length(p, b), used = rows(b, p.query_length);
    check(first >= 0 && first <= end, "starts[", b, "] is ", first, "; it must be 0 to ", end,
          ", the end of the request's keys");
    check(used >= 0 && used <= p.query_length, "query_lengths[", b, "] is ", used,
          "; it must be 0 to ", p.query_length, ", the query_length of q");
    any_ = any_ || first > 0 || used < p.query_length;
  }
}

template Padding::Padding(const PrefillParams&, Arguments&);
template Padding::Padding(const DecodeParams&, Arguments&);

void run_padded(const PrefillParams& batch, const Padding& padding, int64_t bit_words) {
  run_parts(batch, padding, bit_words);
}

void run_padded(const DecodeParams& batch, const Padding& padding, int64_t bit_words) {
  run_parts(batch, padding, bit_words);
}

BackwardParams backward_of(const PrefillParams& f) {
  BackwardParams b;
  b.backend = f.backend;
  b.dtype = f.dtype;
  b.batch = f.batch;
  b.heads = f.heads;
  b.kv_heads = f.kv_heads;
  b.head_dim = f.head_dim;
  b.value_dim = f.value_dim;
  b.query_length = f.query_length;
  b.cu_seqlens_q = f.cu_seqlens_q;
  b.q = f.q;
  b.kv = f.kv;
  b.out = f.out;
  b.scale = f.scale;
  b.softcap = f.softcap;
  b.sinks = f.sinks;
  b.mask = f.mask;
  b.threads = f.threads;
  return b;
}

void run_padded_backward(const PrefillParams& forward, const BackwardParams& batch,
                         const Padding& padding, int64_t bit_words) {
  const BackwardParams& p = batch;
  clear(p.dq, p.dtype, p.batch, p.query_length, p.heads, p.head_dim);
  clear(p.dk, p.dtype, p.batch, p.kv.key_length, p.kv_heads, p.head_dim);
  clear(p.dv, p.dtype, p.batch, p.kv.key_length, p.kv_heads, p.value_dim);
  if (batch.dsinks) std::fill_n(batch.dsinks, batch.heads, 0.0f);
  std::vector<float> lse, dlse, dsinks(batch.heads);
  for (const Part& part : parts_of(forward, padding)) {
    // The lse of a row without a key is the sink.
    for (int64_t h = 0; batch.dsinks && batch.dlse && h < batch.heads; ++h) {
      const float* first = batch.dlse + head_row(forward, part.request, h);
      for (int64_t row = 0; row < part.first; ++row) batch.dsinks[h] += first[row];
    }
    if (part.rows == 0) continue;
    BackwardParams b = backward_of(call_of(forward, part));
    b.dout = rows_of(batch.dout, part, b.dtype);
    b.dq = rows_of(batch.dq, part, b.dtype);
    b.dk = keys_of(batch.dk, part, b.dtype);
    b.dv = keys_of(batch.dv, part, b.dtype);
    b.tile_bits = batch.tile_bits + part.request * (bit_words / forward.batch);
    lse.clear(), dlse.clear();
    for (int64_t h = 0; h < b.heads; ++h) {
      const int64_t at = head_row(forward, part.request, h) + part.first;
      lse.insert(lse.end(), batch.lse + at, batch.lse + at + part.rows);
      if (batch.dlse) dlse.insert(dlse.end(), batch.dlse + at, batch.dlse + at + part.rows);
    }
    b.lse = lse.data();
    if (batch.dlse) b.dlse = dlse.data();
    if (batch.dsinks) b.dsinks = dsinks.data();
    backward(b);
    for (int64_t h = 0; batch.dsinks && h < b.heads; ++h) batch.dsinks[h] += dsinks[h];
  }
}

}  // namespace blasst::binding
