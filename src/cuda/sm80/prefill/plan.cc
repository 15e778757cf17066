#include "cuda/sm80/prefill/plan.h"

#include "cuda/core/plan.h"
#include "cuda/core/prefill/plan.h"
#include "cuda/sm80/prefill/shape.h"

namespace blasst::cuda::prefill::sm80 {
namespace {

using problem::Phase;

constexpr HeadSizes kSizes[] = {{64, 64}, {96, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

// Of the scalars alone.
problem::Geometry geometry_of(const AttentionParams& params) {
  problem::check_exact_scores(kCudaSm80, "prefill", params.decision);
  check_supported(kCudaSm80, params, Phase::kPrefill, kSizes, problem::Caches::kOfQueries);
  check_work(params.problem, rows_per_block(static_cast<int>(params.problem.value_dim)));
  const TileShape shape{.query_rows = kQueryTileRows,
                        .keys = tile_keys(static_cast<int>(params.problem.head_dim))};
  problem::check_tiles(kCudaSm80, params.decision, shape);
  return problem::geometry(params.problem, Phase::kPrefill, shape);
}

}  // namespace

Plan plan(const AttentionParams& params) {
  return problem::plan_of(BLASST_BACKEND_CUDA_SM80, geometry_of(params),
                          workspace_bytes(params.problem.batch));
}

Launch plan_launch(const AttentionParams& params) {
  const Launch l = plan_call(kCudaSm80, params, geometry_of(params), Scores::kExact);
  check_workspace(kCudaSm80, params.execution, workspace_bytes(params.problem.batch), 16);
  return l;
}

}  // namespace blasst::cuda::prefill::sm80
