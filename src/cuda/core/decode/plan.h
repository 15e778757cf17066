// The parts of a decode launch that every architecture plans alike. Throws Error.
#pragma once

#include <cstdint>
#include <string_view>

#include "blasst/blasst.hpp"
#include "cuda/core/checks.h"
#include "cuda/core/decode/launch.h"
#include "cuda/core/decode/params.h"
#include "cuda/core/plan.h"
#include "problem/checks.h"
#include "problem/geometry.h"

namespace blasst::cuda::decode {

// What no decode kernel does.
inline void check_decode(std::string_view backend, const AttentionParams& params) {
  const blasst_problem& p = params.problem;
  if (p.query_lengths)
    refuse(
        backend,
        "query_lengths is set; requests of different numbers of positions are ragged (1) queries "
        "in decode");
  if (p.mask.bands) refuse(backend, "mask.bands is set; decode has no bands");
  const TileTest& test = params.decision.test;
  if (test.places != 1)
    refuse(backend, "test.places is {}; decode's thresholds do not depend on the place",
           test.places);
  if (params.report.tile_maxima)
    refuse(backend, "report.tile_maxima is set; decode does not report them");
}

// Query rows that decide together.
inline void check_rows(std::string_view backend, const blasst_problem& p) {
  const int64_t group = p.heads / p.kv_heads, rows = group * p.query_length;
  if (rows > kMaxRows)
    refuse(backend,
           "decode of {} query heads for each KV head at {} positions, {} rows; it does {} rows at "
           "most",
           group, p.query_length, rows, kMaxRows);
}

// All but the types of the cache. kv_heads: those, or the parts of them in which query heads
// decide.
inline Launch plan_call(std::string_view backend, const AttentionParams& params,
                        const problem::Geometry& geometry, int kv_heads,
                        std::size_t workspace_bytes) {
  problem::check_arrays(params);
  Launch l{};
  plan_shapes(l, params);
  plan_queries(backend, l, params.problem);
  plan_keys(backend, l, params.problem);
  l.params.kv_heads = kv_heads;
  l.params.rows = static_cast<int>(problem::all_rows(params.problem));
  l.params.cu_seqlens_q = params.problem.cu_seqlens_q;
  l.params.scale = scale_of(params.problem);
  plan_mask_and_test(l.params, params);
  plan_report(l.params, params.report, geometry);
  check_workspace(backend, params.execution, workspace_bytes, 256);
  l.workspace = params.execution.workspace;
  l.workspace_bytes = params.execution.workspace_bytes;
  return l;
}

}  // namespace blasst::cuda::decode
