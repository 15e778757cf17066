#include "cuda/sm80/decode/plan.h"

#include "cuda/core/checks.h"
#include "cuda/core/decode/plan.h"
#include "cuda/core/decode/splits.h"
#include "cuda/core/plan.h"
#include "cuda/sm80/decode/launch.h"
#include "problem/checks.h"

namespace blasst::cuda::decode::sm80 {
namespace {

using problem::Phase;

constexpr HeadSizes kSizes[] = {{64, 64}, {96, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

int rows_of(const blasst_problem& p) {
  return static_cast<int>(p.heads / p.kv_heads * p.query_length);
}

// Of the scalars alone.
problem::Geometry geometry_of(const AttentionParams& params) {
  check_supported(kCudaSm80, params, Phase::kDecode, kSizes, problem::Caches::kOfQueries);
  check_decode(kCudaSm80, params);
  const blasst_problem& p = params.problem;
  check_rows(kCudaSm80, p);
  const int rows = rows_of(p);
  const TileShape shape{.query_rows = rows,
                        .keys = kTileKeys,
                        .split_tiles = least_split_tiles(rows),
                        .most_splits = most_splits(static_cast<int>(p.kv_heads))};
  problem::check_tiles(kCudaSm80, params.decision, shape);
  return problem::geometry(p, Phase::kDecode, shape);
}

std::size_t workspace_bytes(const blasst_problem& p) {
  const auto value_dim = static_cast<int>(p.value_dim);
  decode::Plan plan = make_plan(static_cast<int>(p.batch), static_cast<int>(p.kv_heads),
                                static_cast<int>(problem::most_keys(p)), rows_of(p), value_dim);
  return place_results(plan, value_dim, nullptr);
}

}  // namespace

blasst_plan plan(const AttentionParams& params) {
  return problem::plan_of(BLASST_BACKEND_CUDA_SM80, geometry_of(params),
                          workspace_bytes(params.problem));
}

Launch plan_launch(const AttentionParams& params) {
  return plan_call(kCudaSm80, params, geometry_of(params),
                   static_cast<int>(params.problem.kv_heads), workspace_bytes(params.problem));
}

}  // namespace blasst::cuda::decode::sm80
