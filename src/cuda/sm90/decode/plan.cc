#include "cuda/sm90/decode/plan.h"

#include <cstdint>

#include "cuda/core/checks.h"
#include "cuda/core/decode/plan.h"
#include "cuda/core/decode/splits.h"
#include "cuda/core/plan.h"
#include "cuda/sm90/decode/latent/shape.h"
#include "cuda/sm90/decode/shape.h"
#include "problem/checks.h"
#include "problem/element.h"
#include "problem/parts.h"

namespace blasst::cuda::decode {
namespace {

using problem::head_parts;
using problem::Phase;

constexpr HeadSizes kSizes[] = {
    {64, 64}, {128, 128}, {192, 128}, {256, 256}, {latent::kQkDim, latent::kValueDim}};

// Types of keys and values, of which check_types has looked at each.
void check_cache(const blasst_problem& p) {
  const DType k = p.kv.k.dtype, v = p.kv.v.dtype;
  const bool int8_keys = k == BLASST_INT8 && v == p.q.dtype;
  if (k != v && !int8_keys)
    refuse(kCudaSm90,
           "k is {} and v {}; decode does both in one type, or k in int8 and v in the type of q",
           problem::dtype_name(k), problem::dtype_name(v));
  if (int8_keys && p.head_dim != 128)
    refuse(kCudaSm90, "k is int8 and v {} with head_dim {}; decode does these with 128",
           problem::dtype_name(v), p.head_dim);
  if (problem::is_8_bits(k) && p.head_dim != p.value_dim)
    refuse(kCudaSm90,
           "k is {} with head_dim {} and value_dim {}; decode does caches in 8 bits of 64, 128 and "
           "256, both alike",
           problem::dtype_name(k), p.head_dim, p.value_dim);
}

void check_supported(const AttentionParams& params) {
  cuda::check_supported(kCudaSm90, params, Phase::kDecode, kSizes,
                        problem::Caches::kOfQueriesOr8Bits);
  check_decode(kCudaSm90, params);
  const blasst_problem& p = params.problem;
  check_cache(p);
  if (!latent::is_latent(p.value_dim)) return check_rows(kCudaSm90, p);
  if (p.kv_heads != 1)
    refuse(kCudaSm90, "kv_heads is {}; a decode over latents (head_dim {}, value_dim {}) has 1",
           p.kv_heads, p.head_dim, p.value_dim);
}

// The kernel reads a latent once, as key and as value.
void check_values_in_keys(const blasst_problem& p) {
  const View &k = p.kv.k, &v = p.kv.v;
  const auto [outer, tokens] = problem::key_tensor(p);
  if (problem::most_keys(p) == 0 || outer == 0) return;
  if (v.data == k.data && v.stride_token == k.stride_token &&
      (v.stride_request == k.stride_request || outer == 1))
    return;
  refuse(kCudaSm90,
         "v is not k's first {} elements in their memory (data {} and {}, stride_token {} and {}, "
         "stride_request {} and {}); a decode over latents takes v as a view of k",
         p.value_dim, v.data, k.data, v.stride_token, k.stride_token, v.stride_request,
         k.stride_request);
}

// Query heads that decide together, and their KV heads: of latents, several parts of the one.
int parts_of(const blasst_problem& p) {
  const int64_t parts = latent::is_latent(p.value_dim) ? head_parts(p, latent::kMostRows) : 1;
  return static_cast<int>(p.kv_heads * parts);
}

// Of the scalars alone.
problem::Geometry geometry_of(const AttentionParams& params) {
  check_supported(params);
  const blasst_problem& p = params.problem;
  const int parts = parts_of(p);
  const auto rows = static_cast<int>(p.heads / parts * p.query_length);
  const SplitRule rule = split_rule(rows, parts, static_cast<int>(p.value_dim));
  const TileShape shape{.query_rows = rows,
                        .keys = kTileKeys,
                        .split_tiles = rule.least_tiles,
                        .most_splits = rule.most};
  problem::check_tiles(kCudaSm90, params.decision, shape);
  return problem::geometry(p, Phase::kDecode, shape);
}

Cache cache_of(DType keys, DType values) {
  if (keys == BLASST_INT8) return values == BLASST_INT8 ? Cache::kInt8 : Cache::kInt8Keys;
  return keys == BLASST_FLOAT8_E4M3 ? Cache::kFloat8 : Cache::kOfQueries;
}

Scales scales_of(const blasst_scales& s) { return {s.values, s.stride_request, s.stride_head}; }

std::size_t workspace_bytes(const blasst_problem& p) {
  return decode::workspace_bytes(static_cast<int>(p.batch), static_cast<int>(p.heads), parts_of(p),
                                 static_cast<int>(p.query_length),
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
  const blasst_problem& p = params.problem;
  Launch l = plan_call(kCudaSm90, params, geometry, parts_of(p), workspace_bytes(p));
  if (latent::is_latent(l.value_dim)) check_values_in_keys(p);
  l.cache = cache_of(p.kv.k.dtype, p.kv.v.dtype);
  l.params.k_scales = scales_of(p.k_scales);
  l.params.v_scales = scales_of(p.v_scales);
  return l;
}

}  // namespace blasst::cuda::decode
