#include "cuda/sm90/backward/plan.h"

#include <numbers>
#include <string_view>
#include <utility>

#include "cuda/core/checks.h"
#include "cuda/core/plan.h"
#include "cuda/core/prefill/launch.h"
#include "cuda/core/prefill/order.h"
#include "cuda/sm90/backward/shape.h"
#include "cuda/sm90/prefill/shape.h"
#include "problem/checks.h"
#include "problem/element.h"
#include "problem/problem.h"

namespace blasst::cuda::backward {
namespace {

using problem::ceil_div;
using problem::check_range;
using problem::Geometry;
using problem::Phase;

constexpr HeadSizes kSizes[] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};

// Room for the key tiles of all requests: a ragged one shares tiles of tokens with nobody.
int64_t all_key_tiles(const blasst_problem& p, int64_t tile_keys) {
  if (p.kv.layout == BLASST_LAYOUT_RAGGED) return p.kv.tokens / tile_keys + p.batch;
  return p.batch * ceil_div(problem::most_keys(p), tile_keys);
}

// Slots for the first key tiles of long requests, where query heads share them.
int64_t sum_slots(const blasst_problem& p, int64_t tile_keys) {
  if (p.heads == p.kv_heads || problem::most_keys(p) <= kShortKeyTiles * tile_keys) return 0;
  if (p.kv.layout != BLASST_LAYOUT_RAGGED) return p.batch;
  return all_key_tiles(p, tile_keys) / kShortKeyTiles + 1;
}

int64_t keeper_words(const blasst_problem& p) {
  return ceil_div(ceil_div(problem::most_rows(p), kQueryTileRows), 32);
}

WorkspaceLayout layout_of(const blasst_problem& p, const Geometry& g) {
  const auto aligned = [](std::size_t bytes) { return (bytes + 255) / 256 * 256; };
  WorkspaceLayout w{};
  w.rows = aligned(prefill::workspace_bytes(p.batch));
  w.keepers = w.rows + aligned(sizeof(RowBlock) * p.heads * g.query_tiles);
  w.sums = w.keepers +
           aligned(sizeof(unsigned) * p.heads * all_key_tiles(p, g.shape.keys) * keeper_words(p));
  // A group's parts of both gradients, of all KV heads.
  w.bytes = w.sums + aligned(sizeof(float) * sum_slots(p, g.shape.keys) * p.heads * g.shape.keys *
                             (p.head_dim + p.value_dim));
  return w;
}

// Of the scalars alone.
Geometry geometry_of(const BackwardParams& params) {
  problem::check_scalars(params);
  check_supported(kCudaSm90, problem::forward_of(params), Phase::kPrefill, kSizes,
                  problem::Caches::kOfQueries);
  const blasst_problem& p = params.problem;
  const Gradients& g = params.gradients;
  if (p.kv.layout == BLASST_LAYOUT_PAGED)
    refuse(kCudaSm90, "kv.layout is paged (2); backward does dense (0) and ragged (1) keys");
  for (const auto& [name, view] : {std::pair{"dout", &g.dout}, std::pair{"dq", &g.dq},
                                   std::pair{"dk", &g.dk}, std::pair{"dv", &g.dv}})
    if (view->dtype != p.q.dtype)
      refuse(kCudaSm90, "q is {} and {} {}; it does tensors of one type",
             problem::dtype_name(p.q.dtype), name, problem::dtype_name(view->dtype));
  const auto dim = static_cast<int>(p.head_dim);
  const TileShape shape{.query_rows = kQueryTileRows, .keys = prefill::tile_keys(dim)};
  const Geometry geometry = problem::geometry(p, Phase::kPrefill, shape);
  check_range("batch * heads", p.batch * p.heads, 0, kUnlimited - 1);
  check_range("query tiles of all heads", p.heads * geometry.query_tiles, 0, kUnlimited - 1);
  check_range("key tiles of all KV heads",
              p.kv_heads * all_key_tiles(p, shape.keys) + p.heads * sum_slots(p, shape.keys), 0,
              kUnlimited - 1);
  return geometry;
}

OutputRows rows_of(const View& view) {
  return {view.data, view.stride_request, view.stride_token, view.stride_head};
}

void plan_gradients(Launch& l, const BackwardParams& params) {
  problem::check_gradients(params);
  const Gradients& g = params.gradients;
  for (const auto& [name, view] : {std::pair{"dout", &g.dout}, std::pair{"dq", &g.dq},
                                   std::pair{"dk", &g.dk}, std::pair{"dv", &g.dv}})
    check_aligned(kCudaSm90, name, *view);
  const blasst_problem& p = params.problem;
  const auto [outer, tokens] = problem::query_tensor(p);
  l.dout = tensor(g.dout, outer, tokens, p.heads, p.value_dim);
  Params& b = l.params;
  b.dout = rows_of(g.dout);
  b.dq = rows_of(g.dq), b.dk = rows_of(g.dk), b.dv = rows_of(g.dv);
  b.lse = g.lse, b.dlse = g.dlse;
  b.tile_bits = g.tile_bits;
  b.dsinks = g.dsinks;
}

}  // namespace

Plan plan(const BackwardParams& params) {
  const Geometry geometry = geometry_of(params);
  return problem::plan_of(BLASST_BACKEND_CUDA_SM90, geometry,
                          layout_of(params.problem, geometry).bytes);
}

Launch plan_launch(const BackwardParams& params) {
  const Geometry geometry = geometry_of(params);
  const blasst_problem& p = params.problem;
  const AttentionParams forward = problem::forward_of(params);
  problem::check_arrays(forward);
  // The forward's part of a launch, planned as the forward's.
  prefill::Launch f{};
  plan_shapes(f, forward);
  plan_queries(kCudaSm90, f, p);
  plan_keys(kCudaSm90, f, p);
  plan_mask_and_test(f.params, forward);
  f.params.bands = p.mask.bands;
  f.params.rows = static_cast<int>(problem::all_rows(p));
  f.params.cu_seqlens_q = p.cu_seqlens_q;
  f.params.query_lengths = p.query_lengths;

  Launch l{};
  l.element = f.element, l.qk_dim = f.qk_dim, l.value_dim = f.value_dim;
  l.stream = f.stream;
  l.q = f.q, l.k = f.k, l.v = f.v;
  Params& b = l.params;
  b.forward = f.params;
  constexpr float kLog2e = std::numbers::log2e_v<float>;
  b.scale = scale_of(p);
  b.forward.softcap_scale = p.softcap > 0 ? b.scale / p.softcap : 0;
  b.forward.score_to_log2 = (p.softcap > 0 ? p.softcap : b.scale) * kLog2e;
  plan_gradients(l, params);
  b.tile_words = static_cast<int>(geometry.tile_words);
  b.query_tiles = static_cast<int>(geometry.query_tiles);

  const WorkspaceLayout layout = layout_of(p, geometry);
  check_workspace(kCudaSm90, params.execution, layout.bytes, 256);
  auto* workspace = static_cast<std::byte*>(params.execution.workspace);
  b.forward.next_item = reinterpret_cast<int*>(workspace);
  b.rows = reinterpret_cast<RowBlock*>(workspace + layout.rows);
  b.keepers = reinterpret_cast<unsigned*>(workspace + layout.keepers);
  b.keeper_words = static_cast<int>(keeper_words(p));
  b.key_tiles = static_cast<int>(all_key_tiles(p, geometry.shape.keys));
  b.sums = reinterpret_cast<float*>(workspace + layout.sums);
  b.sum_slots = static_cast<int>(sum_slots(p, geometry.shape.keys));
  return l;
}

}  // namespace blasst::cuda::backward
