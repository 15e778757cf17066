// The parts of a prefill launch that every architecture plans alike. Throws Error.
#pragma once

#include <algorithm>
#include <cstdint>

#include "blasst/blasst.hpp"
#include "cuda/core/prefill/params.h"
#include "cuda/core/tensor.h"
#include "problem/checks.h"
#include "problem/geometry.h"

namespace blasst::cuda::prefill {

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

}  // namespace blasst::cuda::prefill
