#include "cuda/sm90/decode/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "attention/checks.h"
#include "attention/tiles.h"
#include "cuda/checks.h"
#include "cuda/sm90/decode/schedule.h"

namespace blasst::cuda::decode {
namespace {

using attention::fail;

void check_supported(const DecodeParams& p) {
  if (p.dtype == BLASST_FLOAT32) refuse("dtype is float32; it does bfloat16 and float16");
  if (p.head_dim != p.value_dim || (p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256))
    refuse("head_dim is {} and value_dim {}; it does 64, 128 and 256, both alike", p.head_dim,
           p.value_dim);
  const int64_t rows = p.heads / p.kv_heads * p.query_length;
  if (rows > kMaxRows)
    refuse(
        "decode of {} query heads for each KV head at {} positions, {} rows; it does {} rows at "
        "most",
        p.heads / p.kv_heads, p.query_length, rows, kMaxRows);
  if (p.mask.blocks) refuse("mask.blocks is set; it has no block masks");
  if (p.test.places != 1)
    refuse("test.places is {}; its thresholds do not depend on the query tile", p.test.places);
  if (p.report.tile_maxima) refuse("report.tile_maxima is set; it does not report them");
  if (p.mask.bands) refuse("mask.bands is set; decode has no bands");
  if (p.threads != 0) refuse("threads is {}; it must be 0", p.threads);
}

Tensor tensor(const View& view, int64_t outer, int64_t tokens, int64_t heads) {
  return {view.data,         outer,           tokens, heads, view.stride_request,
          view.stride_token, view.stride_head};
}

void plan_queries(Launch& l, const DecodeParams& params) {
  Params& p = l.params;
  for (const auto& [name, view] : {std::pair{"q", &params.q}, std::pair{"out", &params.out}}) {
    attention::check_view(name, *view, params.dtype, params.batch, params.query_length,
                          params.heads, params.head_dim);
    check_aligned(name, *view);
  }
  if (params.batch > 0)
    attention::check_no_overlap("out", params.out, params.batch, params.query_length, params.heads,
                                params.value_dim);
  attention::check_not_shared("out", params.out, "q", params.q, params.dtype);
  attention::check_not_shared("out", params.out, "k", params.kv.k, params.dtype);
  attention::check_not_shared("out", params.out, "v", params.kv.v, params.dtype);
  l.q = tensor(params.q, params.batch, params.query_length, params.heads);
  p.query_length = static_cast<int>(params.query_length);
  p.out = params.out.data;
  p.out_stride_request = params.out.stride_request;
  p.out_stride_token = params.out.stride_token;
  p.out_stride_head = params.out.stride_head;
}

void plan_keys(Launch& l, const DecodeParams& params) {
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

void plan_scores(Params& p, const DecodeParams& params) {
  p.scale = params.scale > 0 ? params.scale : 1 / std::sqrt(static_cast<float>(params.head_dim));
  p.softcap = params.softcap;
  p.sinks = params.sinks;
  const attention::Distances d = attention::allowed_distances(params.mask, nullptr);
  constexpr int64_t limit = kUnlimited;
  p.least_distance = static_cast<int>(std::clamp(d.least, -limit, limit));
  p.most_distance = static_cast<int>(std::clamp(d.most, -limit, limit));
  p.order = params.order;
  p.test = params.test.kind;
  p.thresholds = params.test.values;
  p.threshold_stride_request = params.test.stride_request;
  p.threshold_stride_head = params.test.stride_head;
}

void plan_report(Params& p, const Report& report) {
  p.lse = report.lse;
  p.dropped_mass_bound = report.dropped_mass_bound;
  p.visitable = reinterpret_cast<unsigned long long*>(report.tiles_visitable);
  p.skipped = reinterpret_cast<unsigned long long*>(report.tiles_skipped);
  p.tile_bits = report.tile_bits;
  p.tile_words = ceil_div(ceil_div(p.key_length, kTileKeys), 32);
  p.gap_histogram = reinterpret_cast<unsigned long long*>(report.gap_histogram);
}

Launch plan_all(const DecodeParams& params) {
  attention::check_scalars(params);
  check_supported(params);
  Launch l{};
  l.element = params.dtype == BLASST_FLOAT16 ? Element::kHalf : Element::kBFloat16;
  l.dim = static_cast<int>(params.head_dim);
  l.params.batch = static_cast<int>(params.batch);
  l.params.heads = static_cast<int>(params.heads);
  l.params.kv_heads = static_cast<int>(params.kv_heads);
  plan_queries(l, params);
  plan_keys(l, params);
  plan_scores(l.params, params);
  plan_report(l.params, params.report);
  l.stream = params.stream;
  return l;
}

std::size_t bytes_of(const Launch& l) {
  const Params& p = l.params;
  return workspace_bytes(p.batch, p.heads, p.kv_heads, p.query_length, p.key_length, l.dim);
}

}  // namespace

Launch plan(const DecodeParams& params) {
  Launch l = plan_all(params);
  if (const std::size_t needed = bytes_of(l); params.workspace_bytes < needed)
    fail("workspace has {} bytes; a cuda call allocates nothing and this one needs {}",
         params.workspace_bytes, needed);
  if (reinterpret_cast<uintptr_t>(params.workspace) % 256 != 0)
    fail("workspace is {}; it must be 256-byte aligned", params.workspace);
  l.workspace = params.workspace;
  l.workspace_bytes = params.workspace_bytes;
  return l;
}

std::size_t workspace_bytes(const DecodeParams& params) { return bytes_of(plan_all(params)); }

TileShape tile_shape(const DecodeParams& params) {
  const Params p = plan_all(params).params;
  const int rows = p.heads / p.kv_heads * p.query_length;
  return {.query_rows = rows,
          .keys = kTileKeys,
          .split_tiles = least_split_tiles(rows),
          .most_splits = most_splits(p.kv_heads)};
}

}  // namespace blasst::cuda::decode
