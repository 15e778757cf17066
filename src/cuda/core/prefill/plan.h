// The parts of a prefill launch that every architecture plans alike. Throws Error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <string_view>

#include "blasst/blasst.hpp"
#include "cuda/core/plan.h"
#include "cuda/core/prefill/launch.h"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/params.h"
#include "cuda/core/tensor.h"
#include "problem/checks.h"
#include "problem/geometry.h"

namespace blasst::cuda::prefill {

// Whether items can be counted. block_rows: of one.
inline void check_work(const blasst_problem& p, int block_rows) {
  problem::check_range("batch * heads", p.batch * p.heads, 0, kUnlimited - 1);
  problem::check_range(
      "blocks of query rows",
      p.heads * most_blocks(problem::all_rows(p), p.batch, problem::most_rows(p), block_rows), 0,
      kUnlimited - 1);
}

inline void plan_scores(Params& p, const blasst_problem& problem, Scores scores) {
  constexpr float kLog2e = std::numbers::log2e_v<float>;
  const float scale = scale_of(problem), softcap = problem.softcap;
  // A raw score is q.k or, in int8, a base-2 logarithm.
  const bool int8 = scores == Scores::kInt8;
  p.softcap_scale = softcap > 0 ? (int8 ? 1 / kLog2e : scale) / softcap : 0;
  p.score_to_log2 = softcap > 0 ? softcap * kLog2e : int8 ? 1 : scale * kLog2e;
  p.quantized.dot_to_log2 = scale * kLog2e;
  p.bands = problem.mask.bands;
}

inline void plan_rows(Params& p, const blasst_problem& problem) {
  p.rows = static_cast<int>(problem::all_rows(problem));
  p.cu_seqlens_q = problem.cu_seqlens_q;
  p.query_lengths = problem.query_lengths;
}

inline void plan_places(Params& p, const TileTest& test) {
  p.test.places = static_cast<int>(std::min<int64_t>(test.places, kUnlimited));
  p.test.stride_place = test.stride_place;
}

inline void plan_maxima(Params& p, const Report& report, const problem::Geometry& geometry) {
  problem::check_tile_maxima(report, geometry);
  p.report.tile_maxima = report.tile_maxima;
  p.report.tile_maxima_stride = report.tile_maxima_stride;
}

inline Variant variant_of(const Params& p) {
  const ReportArrays& r = p.report;
  if (r.gap_histogram || r.dropped_mass_bound || r.tile_maxima) return Variant::kReport;
  const bool counts = r.visitable || r.skipped || r.tile_bits;
  return p.test.kind != BLASST_TEST_NONE || counts ? Variant::kSparse : Variant::kDense;
}

// All but the workspace's check, and the keys' bytes of scores in int8.
inline Launch plan_call(std::string_view backend, const AttentionParams& params,
                        const problem::Geometry& geometry, Scores scores) {
  problem::check_arrays(params);
  Launch l{};
  plan_shapes(l, params);
  plan_queries(backend, l, params.problem);
  plan_rows(l.params, params.problem);
  plan_keys(backend, l, params.problem);
  l.scores = scores;
  plan_scores(l.params, params.problem, scores);
  plan_mask_and_test(l.params, params);
  plan_places(l.params, params.decision.test);
  plan_report(l.params, params.report, geometry);
  plan_maxima(l.params, params.report, geometry);
  l.params.report.query_tiles = static_cast<int>(geometry.query_tiles);
  l.variant = variant_of(l.params);
  l.workspace = static_cast<int*>(params.execution.workspace);
  return l;
}

}  // namespace blasst::cuda::prefill
