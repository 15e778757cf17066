#include "cuda/sm90/prefill/plan.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>

#include "cuda/core/checks.h"
#include "cuda/core/plan.h"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/plan.h"
#include "cuda/sm90/prefill/quantize.h"
#include "cuda/sm90/prefill/shape.h"
#include "problem/checks.h"

namespace blasst::cuda::prefill {
namespace {

using problem::check_range;
using problem::Phase;

constexpr HeadSizes kSizes[] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};

Scores scores_of(const Decision& decision) {
  return decision.scores == BLASST_SCORES_INT8 ? Scores::kInt8 : Scores::kExact;
}

QuantizedLayout quantized_layout_of(const blasst_problem& p) {
  const int dim = static_cast<int>(p.head_dim);
  const bool ragged = p.kv.layout == BLASST_LAYOUT_RAGGED;
  return quantized_layout(p.batch, p.kv_heads, problem::most_keys(p), ragged ? p.kv.tokens : -1,
                          dim, tile_keys(dim), p.kv.k.dtype == BLASST_INT8);
}

// Lists of the batch first, then the keys' bytes.
std::size_t lists_bytes(const blasst_problem& p) {
  return (workspace_bytes(p.batch) + 127) / 128 * 128;
}

std::size_t needed_workspace(const AttentionParams& params) {
  if (scores_of(params.decision) == Scores::kExact) return workspace_bytes(params.problem.batch);
  return lists_bytes(params.problem) + quantized_layout_of(params.problem).bytes;
}

void plan_quantized(Params& p, const AttentionParams& params) {
  const QuantizedLayout layout = quantized_layout_of(params.problem);
  auto* base = static_cast<std::byte*>(params.execution.workspace) + lists_bytes(params.problem);
  p.quantized.tiles = static_cast<int>(layout.tiles);
  p.quantized.data = reinterpret_cast<int8_t*>(base);
  p.quantized.units = reinterpret_cast<KeyTileUnit*>(base + layout.units);
  p.quantized.broken = reinterpret_cast<BrokenKeys*>(base + layout.broken);
  p.quantized.as_stored = params.problem.kv.k.dtype == BLASST_INT8;
  if (p.quantized.as_stored) return;
  p.quantized.means = reinterpret_cast<float*>(base + layout.means);
  p.quantized.sums = reinterpret_cast<double*>(base + layout.sums);
  p.quantized.level = p.report.lse || p.report.tile_maxima || p.sinks || p.softcap > 0 ||
                      p.test.kind == BLASST_TEST_ABSOLUTE;
}

// Of the scalars alone.
problem::Geometry geometry_of(const AttentionParams& params) {
  const blasst_problem& p = params.problem;
  check_supported(kCudaSm90, params, Phase::kPrefill, kSizes,
                  problem::scores_take_bytes(params.decision.scores, p.kv.k.dtype)
                      ? problem::Caches::kInt8Keys
                      : problem::Caches::kOfQueries);
  const int dim = static_cast<int>(p.head_dim);
  check_work(p, rows_per_block(dim));
  if (scores_of(params.decision) == Scores::kInt8) {
    if (p.head_dim != p.value_dim)
      refuse(kCudaSm90,
             "scores in int8 of head_dim {} and value_dim {}; it has them where both are alike",
             p.head_dim, p.value_dim);
    check_range("key tiles of all requests", quantized_layout_of(p).tiles, 0, kUnlimited - 1);
    check_range("kv_heads", p.kv_heads, 1, 65535);  // blocks of a launch
  }
  const TileShape shape{.query_rows = kQueryTileRows, .keys = tile_keys(dim)};
  problem::check_tiles(kCudaSm90, params.decision, shape);
  return problem::geometry(p, Phase::kPrefill, shape);
}

}  // namespace

Plan plan(const AttentionParams& params) {
  return problem::plan_of(BLASST_BACKEND_CUDA_SM90, geometry_of(params), needed_workspace(params));
}

Launch plan_launch(const AttentionParams& params) {
  const Scores scores = scores_of(params.decision);
  Launch l = plan_call(kCudaSm90, params, geometry_of(params), scores);
  check_workspace(kCudaSm90, params.execution, needed_workspace(params),
                  scores == Scores::kInt8 ? 128 : 16);
  if (scores == Scores::kInt8) plan_quantized(l.params, params);
  l.k_scales = params.problem.k_scales;
  return l;
}

}  // namespace blasst::cuda::prefill
