#include "cuda/sm90/decode/plan.h"

#include <cstdint>

#include "cuda/core/checks.h"
#include "cuda/core/decode/splits.h"
#include "cuda/core/plan.h"
#include "problem/checks.h"

namespace blasst::cuda::decode {
namespace {

using problem::Phase;

constexpr HeadSizes kSizes[] = {{64, 64}, {128, 128}, {256, 256}};

void check_decode(const AttentionParams& params) {
  const blasst_problem& p = params.problem;
  const int64_t group = p.heads / p.kv_heads, rows = group * p.query_length;
  if (p.query_layout == BLASST_LAYOUT_RAGGED)
    refuse("query_layout is ragged; decode does dense queries");
  if (p.query_lengths) refuse("query_lengths is set; decode's requests use all of their rows");
  if (rows > kMaxRows)
    refuse(
        "decode of {} query heads for each KV head at {} positions, {} rows; it does {} rows at "
        "most",
        group, p.query_length, rows, kMaxRows);
  if (p.mask.bands) refuse("mask.bands is set; decode has no bands");
  const TileTest& test = params.decision.test;
  if (test.places != 1)
    refuse("test.places is {}; decode's thresholds do not depend on the place", test.places);
  if (params.report.tile_maxima) refuse("report.tile_maxima is set; decode does not report them");
}

// Of the scalars alone.
problem::Geometry geometry_of(const AttentionParams& params) {
  check_supported(params, Phase::kDecode, kSizes);
  check_decode(params);
  const blasst_problem& p = params.problem;
  const int rows = static_cast<int>(p.heads / p.kv_heads * p.query_length);
  const TileShape shape{.query_rows = rows,
                        .keys = kTileKeys,
                        .split_tiles = least_split_tiles(rows),
                        .most_splits = most_splits(static_cast<int>(p.kv_heads))};
  problem::check_tiles("cuda", params.decision, shape);
  return problem::geometry(p, Phase::kDecode, shape);
}

std::size_t workspace_bytes(const blasst_problem& p) {
  return decode::workspace_bytes(static_cast<int>(p.batch), static_cast<int>(p.heads),
                                 static_cast<int>(p.kv_heads), static_cast<int>(p.query_length),
                                 static_cast<int>(problem::most_keys(p)),
                                 static_cast<int>(p.value_dim));
}

}  // namespace

blasst_plan plan(const AttentionParams& params) {
  const problem::Geometry geometry = geometry_of(params);
  return problem::plan_of(BLASST_BACKEND_CUDA_SM90, geometry, workspace_bytes(params.problem));
}

Launch plan_launch(const AttentionParams& params) {
  const problem::Geometry geometry = geometry_of(params);
  problem::check_arrays(params);
  Launch l{};
  plan_shapes(l, params);
  plan_queries(l, params.problem);
  plan_keys(l, params.problem);
  l.params.scale = scale_of(params.problem);
  plan_mask_and_test(l.params, params);
  plan_report(l.params, params.report, geometry);
  check_workspace(params.execution, workspace_bytes(params.problem), 256);
  l.workspace = params.execution.workspace;
  l.workspace_bytes = params.execution.workspace_bytes;
  return l;
}

}  // namespace blasst::cuda::decode
