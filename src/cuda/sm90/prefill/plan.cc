#include "cuda/sm90/prefill/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "attention/checks.h"
#include "attention/tiles.h"
#include "cuda/checks.h"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/prefill/schedule.h"

namespace blasst::cuda::prefill {
namespace {

using attention::ceil_div;
using attention::check_range;
using attention::fail;

void plan_rows(Launch& l, const PrefillParams& params) {
  const bool ragged = params.cu_seqlens_q != nullptr;
  check_range("query_length", params.query_length, 0, kUnlimited - 1);
  if (ragged) check_range("rows", params.rows, 0, kUnlimited - 1);
  // 0 rows a ragged request at most: not known.
  const int64_t most = ragged && params.query_length == 0 ? params.rows : params.query_length;
  if (!ragged && params.rows != 0)
    fail("rows is {}, but cu_seqlens_q is null; it is for ragged queries", params.rows);
  if (ragged && params.query_lengths)
    fail("query_lengths is set together with cu_seqlens_q; it is for dense queries");
  if (ragged && params.kv.starts)
    fail("kv.starts is set together with cu_seqlens_q; it is for dense queries");
  const int64_t rows = ragged ? params.rows : params.batch * most;
  if (!ragged) check_range("batch * query_length", rows, 0, kUnlimited - 1);
  if (ragged && rows > params.batch * most)
    fail("rows is {}, more than batch {} times query_length {}, the most rows of a request", rows,
         params.batch, most);
  plan_queries(l, params, ragged ? 1 : params.batch, ragged ? rows : most);
  l.params.query_length = static_cast<int>(most);
  l.params.rows = static_cast<int>(rows);
  l.params.cu_seqlens_q = params.cu_seqlens_q;
  l.params.query_lengths = params.query_lengths;
}

void plan_scores(Params& p, const PrefillParams& params) {
  const float scale =
      params.scale > 0 ? params.scale : 1 / std::sqrt(static_cast<float>(params.head_dim));
  p.softcap_scale = params.softcap > 0 ? scale / params.softcap : 0;
  p.score_to_log2 = (params.softcap > 0 ? params.softcap : scale) * std::numbers::log2e_v<float>;
  p.bands = params.mask.bands;
}

void plan_places(Params& p, const TileTest& test) {
  p.threshold_places = static_cast<int>(std::min<int64_t>(test.places, kUnlimited));
  p.threshold_stride_place = test.stride_place;
}

void plan_maxima(Params& p, const Report& report, int64_t tile_keys) {
  if (!report.tile_maxima) return;
  check_range("report.tile_maxima_stride", report.tile_maxima_stride,
              ceil_div(p.key_length, tile_keys), kUnlimited - 1);
  p.tile_maxima = report.tile_maxima;
  p.tile_maxima_stride = report.tile_maxima_stride;
}

Variant variant_of(const Params& p) {
  if (p.tile_bits || p.gap_histogram || p.dropped_mass_bound || p.tile_maxima)
    return Variant::kReport;
  const bool counts = p.visitable || p.skipped;
  return p.test != BLASST_TEST_NONE || counts ? Variant::kSparse : Variant::kDense;
}

Launch plan_all(const PrefillParams& params) {
  attention::check_scalars(params);
  check_supported(params);
  check_range("batch * heads", params.batch * params.heads, 0, kUnlimited - 1);
  Launch l{};
  plan_shapes(l, params);
  plan_rows(l, params);
  plan_keys(l, params);
  plan_scores(l.params, params);
  plan_mask_and_test(l.params, params);
  plan_places(l.params, params.test);
  plan_report(l.params, params.report, tile_keys(l.dim));
  plan_maxima(l.params, params.report, tile_keys(l.dim));
  l.variant = variant_of(l.params);
  check_range("blocks of query rows",
              params.heads * most_blocks(l.params.rows, params.batch, l.params.query_length,
                                         rows_per_block(l.dim)),
              0, kUnlimited - 1);
  return l;
}

}  // namespace

Launch plan(const PrefillParams& params) {
  Launch l = plan_all(params);
  if (const std::size_t needed = workspace_bytes(l.params); params.workspace_bytes < needed)
    fail("workspace has {} bytes; a cuda call allocates nothing and this one needs {}",
         params.workspace_bytes, needed);
  if (reinterpret_cast<uintptr_t>(params.workspace) % 16 != 0)
    fail("workspace is {}; it must be 16-byte aligned", params.workspace);
  l.workspace = static_cast<int*>(params.workspace);
  return l;
}

std::size_t workspace_bytes(const PrefillParams& params) {
  return workspace_bytes(plan_all(params).params);
}

TileShape tile_shape(const PrefillParams& params) {
  plan_all(params);
  return {.query_rows = kRowsPerWarpgroup,
          .keys = tile_keys(static_cast<int>(params.head_dim)),
          .split_tiles = 0};
}

}  // namespace blasst::cuda::prefill
