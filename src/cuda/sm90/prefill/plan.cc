#include "cuda/sm90/prefill/plan.h"

#include <algorithm>
#include <cstdint>
#include <numbers>

#include "attention/checks.h"
#include "cuda/core/checks.h"
#include "cuda/core/plan.h"
#include "cuda/core/prefill/order.h"
#include "cuda/sm90/prefill/shape.h"

namespace blasst::cuda::prefill {
namespace {

using attention::check_range;
using attention::Phase;

void plan_scores(Params& p, const blasst_problem& problem) {
  const float scale = scale_of(problem), softcap = problem.softcap;
  p.softcap_scale = softcap > 0 ? scale / softcap : 0;
  p.score_to_log2 = (softcap > 0 ? softcap : scale) * std::numbers::log2e_v<float>;
  p.bands = problem.mask.bands;
}

void plan_rows(Params& p, const blasst_problem& problem) {
  p.rows = static_cast<int>(attention::all_rows(problem));
  p.cu_seqlens_q = problem.cu_seqlens_q;
  p.query_lengths = problem.query_lengths;
}

void plan_places(Params& p, const TileTest& test) {
  p.test.places = static_cast<int>(std::min<int64_t>(test.places, kUnlimited));
  p.test.stride_place = test.stride_place;
}

void plan_maxima(Params& p, const Report& report, const attention::Geometry& geometry) {
  attention::check_tile_maxima(report, geometry);
  p.report.tile_maxima = report.tile_maxima;
  p.report.tile_maxima_stride = report.tile_maxima_stride;
}

Variant variant_of(const Params& p) {
  const ReportArrays& r = p.report;
  if (r.tile_bits || r.gap_histogram || r.dropped_mass_bound || r.tile_maxima)
    return Variant::kReport;
  const bool counts = r.visitable || r.skipped;
  return p.test.kind != BLASST_TEST_NONE || counts ? Variant::kSparse : Variant::kDense;
}

// Of the scalars alone.
attention::Geometry geometry_of(const AttentionParams& params) {
  check_supported(params, Phase::kPrefill);
  const blasst_problem& p = params.problem;
  check_range("batch * heads", p.batch * p.heads, 0, kUnlimited - 1);
  const int dim = static_cast<int>(p.head_dim);
  check_range("blocks of query rows",
              p.heads * most_blocks(attention::all_rows(p), p.batch, attention::most_rows(p),
                                    rows_per_block(dim)),
              0, kUnlimited - 1);
  const TileShape shape{.query_rows = kQueryTileRows, .keys = tile_keys(dim)};
  attention::check_tiles("cuda", params.decision, shape);
  return attention::geometry(p, Phase::kPrefill, shape);
}

}  // namespace

Plan plan(const AttentionParams& params) {
  return attention::plan_of(BLASST_BACKEND_CUDA, geometry_of(params),
                            workspace_bytes(params.problem.batch));
}

Launch plan_launch(const AttentionParams& params) {
  const attention::Geometry geometry = geometry_of(params);
  attention::check_arrays(params);
  Launch l{};
  plan_shapes(l, params);
  plan_queries(l, params.problem);
  plan_rows(l.params, params.problem);
  plan_keys(l, params.problem);
  plan_scores(l.params, params.problem);
  plan_mask_and_test(l.params, params);
  plan_places(l.params, params.decision.test);
  plan_report(l.params, params.report, geometry);
  plan_maxima(l.params, params.report, geometry);
  l.params.report.query_tiles = static_cast<int>(geometry.query_tiles);
  l.variant = variant_of(l.params);
  check_workspace(params.execution, workspace_bytes(params.problem.batch), 16);
  l.workspace = static_cast<int*>(params.execution.workspace);
  return l;
}

}  // namespace blasst::cuda::prefill
