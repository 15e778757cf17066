#include "cuda/sm90/decode/plan.h"

#include <cmath>
#include <cstdint>

#include "attention/checks.h"
#include "cuda/checks.h"
#include "cuda/sm90/decode/schedule.h"
#include "cuda/sm90/plan.h"

namespace blasst::cuda::decode {
namespace {

using attention::fail;

void check_decode(const DecodeParams& p) {
  const int64_t rows = p.heads / p.kv_heads * p.query_length;
  if (rows > kMaxRows)
    refuse(
        "decode of {} query heads for each KV head at {} positions, {} rows; it does {} rows at "
        "most",
        p.heads / p.kv_heads, p.query_length, rows, kMaxRows);
  if (p.mask.bands) refuse("mask.bands is set; decode has no bands");
  if (p.test.places != 1)
    refuse("test.places is {}; decode's thresholds do not depend on the place", p.test.places);
  if (p.report.tile_maxima) refuse("report.tile_maxima is set; decode does not report them");
}

Launch plan_all(const DecodeParams& params) {
  attention::check_scalars(params);
  cuda::check_supported(params);
  check_decode(params);
  Launch l{};
  plan_shapes(l, params);
  plan_queries(l, params, params.batch, params.query_length);
  plan_keys(l, params);
  l.params.scale =
      params.scale > 0 ? params.scale : 1 / std::sqrt(static_cast<float>(params.head_dim));
  plan_mask_and_test(l.params, params);
  plan_report(l.params, params.report, kTileKeys);
  return l;
}

std::size_t bytes_of(const Launch& l) {
  const Params& p = l.params;
  return workspace_bytes(p.batch, p.heads, p.kv_heads, p.query_length, p.key_length, l.dim);
}

}  // namespace

Launch plan(const DecodeParams& params) {
  Launch l = plan_all(params);
  if (const std::size_t needed = bytes_of(l); params.workspace_bytes < needed)
    fail("workspace has {} bytes; a cuda call allocates nothing and this one needs {}",
         params.workspace_bytes, needed);
  if (reinterpret_cast<uintptr_t>(params.workspace) % 256 != 0)
    fail("workspace is {}; it must be 256-byte aligned", params.workspace);
  l.workspace = params.workspace;
  l.workspace_bytes = params.workspace_bytes;
  return l;
}

std::size_t workspace_bytes(const DecodeParams& params) { return bytes_of(plan_all(params)); }

TileShape tile_shape(const DecodeParams& params) {
  const Params p = plan_all(params).params;
  const int rows = p.heads / p.kv_heads * p.query_length;
  return {.query_rows = rows,
          .keys = kTileKeys,
          .split_tiles = least_split_tiles(rows),
          .most_splits = most_splits(p.kv_heads)};
}

}  // namespace blasst::cuda::decode
