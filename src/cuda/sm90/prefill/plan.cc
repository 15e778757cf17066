#include "cuda/sm90/prefill/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <utility>

#include "attention/checks.h"
#include "attention/tiles.h"
#include "cuda/checks.h"

namespace blasst::cuda::prefill {
namespace {

using attention::ceil_div;
using attention::check_range;
using attention::fail;

void check_supported(const PrefillParams& p) {
  if (p.dtype == BLASST_FLOAT32) refuse("dtype is float32; it does bfloat16 and float16");
  if (p.head_dim != p.value_dim || (p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256))
    refuse("head_dim is {} and value_dim {}; it does 64, 128 and 256, both alike", p.head_dim,
           p.value_dim);
  if (p.mask.blocks) refuse("mask.blocks is set; it has no block masks");
  if (p.test.places != 1)
    refuse("test.places is {}; its thresholds do not depend on the query tile", p.test.places);
  if (p.report.tile_maxima) refuse("report.tile_maxima is set; it does not report them");
  if (p.threads != 0) refuse("threads is {}; it must be 0", p.threads);
}

Tensor tensor(const View& view, int64_t outer, int64_t tokens, int64_t heads) {
  return {view.data,         outer,           tokens, heads, view.stride_request,
          view.stride_token, view.stride_head};
}

void plan_queries(Launch& l, const PrefillParams& params) {
  Params& p = l.params;
  const bool ragged = params.cu_seqlens_q != nullptr;
  check_range("query_length", params.query_length, 0, kUnlimited - 1);
  if (!ragged && params.rows != 0)
    fail("rows is {}, but cu_seqlens_q is null; it is for ragged queries", params.rows);
  const int64_t rows = ragged ? params.rows : params.batch * params.query_length;
  check_range(ragged ? "rows" : "batch * query_length", rows, 0, kUnlimited - 1);
  if (ragged && rows > params.batch * params.query_length)
    fail("rows is {}, more than batch {} times query_length {}, the most rows of a request", rows,
         params.batch, params.query_length);
  const int64_t outer = ragged ? 1 : params.batch;
  const int64_t tokens = ragged ? rows : params.query_length;
  for (const auto& [name, view] : {std::pair{"q", &params.q}, std::pair{"out", &params.out}}) {
    attention::check_view(name, *view, params.dtype, outer, tokens, params.heads, params.head_dim);
    check_aligned(name, *view);
  }
  if (rows > 0)
    attention::check_no_overlap("out", params.out, outer, tokens, params.heads, params.value_dim);
  attention::check_not_shared("out", params.out, "q", params.q, params.dtype);
  attention::check_not_shared("out", params.out, "k", params.kv.k, params.dtype);
  attention::check_not_shared("out", params.out, "v", params.kv.v, params.dtype);
  l.q = tensor(params.q, outer, tokens, params.heads);
  p.query_length = static_cast<int>(params.query_length);
  p.rows = static_cast<int>(rows);
  p.cu_seqlens_q = params.cu_seqlens_q;
  p.out = params.out.data;
  p.out_stride_request = params.out.stride_request;
  p.out_stride_token = params.out.stride_token;
  p.out_stride_head = params.out.stride_head;
}

void plan_keys(Launch& l, const PrefillParams& params) {
  Params& p = l.params;
  const KeysValues& kv = params.kv;
  const KeyRoom room = check_keys(params, kUnlimited - 1);
  l.k = tensor(kv.k, room.outer, room.tokens, params.kv_heads);
  l.v = tensor(kv.v, room.outer, room.tokens, params.kv_heads);
  p.key_length = static_cast<int>(room.most);
  p.lengths = kv.lengths;
  p.cu_seqlens_k = kv.cu_seqlens;
  p.page_table = kv.page_table;
  p.page_table_stride = kv.page_table_stride;
  p.page_size = static_cast<int>(kv.page_size);
  p.pages = static_cast<int>(kv.pages);
}

void plan_scores(Params& p, const PrefillParams& params) {
  const float scale =
      params.scale > 0 ? params.scale : 1 / std::sqrt(static_cast<float>(params.head_dim));
  p.softcap = params.softcap;
  p.softcap_scale = params.softcap > 0 ? scale / params.softcap : 0;
  p.score_to_log2 = (params.softcap > 0 ? params.softcap : scale) * std::numbers::log2e_v<float>;
  p.sinks = params.sinks;
  const attention::Distances d = attention::allowed_distances(params.mask, nullptr);
  constexpr int64_t limit = kUnlimited;
  p.least_distance = static_cast<int>(std::clamp(d.least, -limit, limit));
  p.most_distance = static_cast<int>(std::clamp(d.most, -limit, limit));
  p.bands = params.mask.bands;
  p.order = params.order;
  p.test = params.test.kind;
  p.thresholds = params.test.values;
  p.threshold_stride_request = params.test.stride_request;
  p.threshold_stride_head = params.test.stride_head;
}

void plan_report(Launch& l, const PrefillParams& params) {
  Params& p = l.params;
  const Report& report = params.report;
  p.lse = report.lse;
  p.dropped_mass_bound = report.dropped_mass_bound;
  p.visitable = reinterpret_cast<unsigned long long*>(report.tiles_visitable);
  p.skipped = reinterpret_cast<unsigned long long*>(report.tiles_skipped);
  p.tile_bits = report.tile_bits;
  p.gap_histogram = reinterpret_cast<unsigned long long*>(report.gap_histogram);
  p.tile_words = static_cast<int>(ceil_div(ceil_div(p.key_length, tile_keys(l.dim)), 32));
  if (p.tile_bits || p.gap_histogram || p.dropped_mass_bound)
    l.variant = Variant::kReport;
  else if (p.test != BLASST_TEST_NONE || p.visitable || p.skipped)
    l.variant = Variant::kSparse;
  else
    l.variant = Variant::kDense;
}

Launch plan_all(const PrefillParams& params) {
  attention::check_scalars(params);
  check_supported(params);
  check_range("batch * heads", params.batch * params.heads, 0, kUnlimited - 1);
  Launch l{};
  l.element = params.dtype == BLASST_FLOAT16 ? Element::kHalf : Element::kBFloat16;
  l.dim = static_cast<int>(params.head_dim);
  l.params.batch = static_cast<int>(params.batch);
  l.params.heads = static_cast<int>(params.heads);
  l.params.kv_heads = static_cast<int>(params.kv_heads);
  plan_queries(l, params);
  plan_keys(l, params);
  plan_scores(l.params, params);
  plan_report(l, params);
  check_range("blocks of query rows",
              params.batch * params.heads * ceil_div(params.query_length, kRowsPerBlock), 0,
              kUnlimited - 1);
  l.stream = params.stream;
  return l;
}

}  // namespace

Launch plan(const PrefillParams& params) {
  Launch l = plan_all(params);
  if (params.workspace_bytes < kWorkspaceBytes)
    fail("workspace has {} bytes; a cuda call allocates nothing and needs {}",
         params.workspace_bytes, kWorkspaceBytes);
  if (reinterpret_cast<uintptr_t>(params.workspace) % 16 != 0)
    fail("workspace is {}; it must be 16-byte aligned", params.workspace);
  l.workspace = static_cast<int*>(params.workspace);
  return l;
}

std::size_t workspace_bytes(const PrefillParams& params) {
  plan_all(params);
  return kWorkspaceBytes;
}

TileShape tile_shape(const PrefillParams& params) {
  plan_all(params);
  return {.query_rows = kRowsPerWarpgroup,
          .keys = tile_keys(static_cast<int>(params.head_dim)),
          .split_tiles = 0};
}

}  // namespace blasst::cuda::prefill
