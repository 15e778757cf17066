#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/core/decode/splits.h"
#include "cuda/core/runtime.h"
#include "cuda/sm90/core/tensor_map.h"
#include "cuda/sm90/decode/kernels.h"
#include "cuda/sm90/decode/latent/kernels.h"
#include "cuda/sm90/decode/latent/layout.cuh"
#include "cuda/sm90/decode/latent/shape.h"
#include "cuda/sm90/decode/launch.h"
#include "cuda/sm90/decode/shape.h"

namespace blasst::cuda::decode {
namespace {

// Boxes of one panel by `heads` by `tokens`.
CUtensorMap map_of(const Tensor& t, Element element, int heads, int tokens) {
  return tensor_map(t, element,
                    {{{t.heads, t.stride_head, heads},
                      {t.tokens, t.stride_token, tokens},
                      {t.outer, t.stride_outer, 1}}},
                    CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

// Boxes of `panels` panels by one head by `tokens`, or of one panel where a tile is several boxes.
CUtensorMap map_of_cache(const Tensor& t, Element element, int tokens, int panels) {
  return panels_map(t, element,
                    {{{t.heads, t.stride_head, 1},
                      {t.tokens, t.stride_token, tokens},
                      {t.outer, t.stride_outer, 1}}},
                    tokens == kTileKeys ? panels : 1, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

// Of a row.
int panels_of(int dim, Element element) { return std::max(1, dim * bytes_of(element) / 128); }

// The part of the plan that the shapes decide.
Plan make_plan(int batch, int heads, int kv_heads, int query_length, int key_length,
               int value_dim) {
  const int rows = heads / kv_heads * query_length;
  const bool latents = latent::is_latent(value_dim);
  const int tiles = ceil_div(key_length, kTileKeys);
  Plan plan = plan_splits(batch, kv_heads, key_length, rows, split_rule(rows, kv_heads, value_dim),
                          !latents && whole_groups(batch, kv_heads, tiles, rows, value_dim));
  plan.folds = !latents && adds_splits(value_dim, kernel_rows(rows));
  return plan;
}

}  // namespace

std::size_t workspace_bytes(int batch, int heads, int kv_heads, int query_length, int key_length,
                            int value_dim) {
  Plan plan = make_plan(batch, heads, kv_heads, query_length, key_length, value_dim);
  return place_results(plan, value_dim, nullptr);
}

// All that can fail on the host comes before the first write.
void launch(const Launch& l) {
  Params p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  if (p.rows == 0) return report_nothing(p, stream);
  if (l.k.tokens == 0 || l.k.outer == 0) p.keys.length = 0;  // whatever the lengths say
  Plan plan = make_plan(p.batch, p.heads, p.kv_heads, p.query_length, p.keys.length, l.value_dim);
  place_results(plan, l);
  plan.box_tokens = p.keys.page_table ? std::min(p.keys.page_size, kTileKeys) : kTileKeys;
  plan.half_queries = l.element == Element::kHalf;
  plan.unit_scale = p.softcap > 0 ? 1.0f : p.scale;

  const CUtensorMap q = map_of(l.q, l.element, p.heads / p.kv_heads, p.query_length);
  const auto map = [&](const Tensor& t, bool narrow, int dim) {
    if (p.keys.length == 0) return q;                             // nothing is copied by it
    const Element element = narrow ? Element::kInt8 : l.element;  // any byte
    return map_of_cache(t, element, plan.box_tokens, panels_of(dim, element));
  };
  const bool latents = latent::is_latent(l.value_dim);
  const Kernels kernels =
      latents ? latent::find_kernels(l.element, variant_of(p))
              : find_kernels(l.element, l.cache, l.qk_dim, l.value_dim, plan.rows, variant_of(p));
  allow_shared_memory(kernels.attend, kernels.shared_bytes);
  allow_shared_memory(kernels.combine, kMostCombineBytes);  // loads it, too
  const int blocks = deal_out(plan, multiprocessors() * kernels.blocks,
                              latents ? latent::most_item_tiles(plan.rows) : kMostItemTiles);

  // A latent comes in halves of its value, and its rotary part.
  const CUtensorMap k = map(l.k, narrow_keys(l.cache), latents ? latent::kHalfDim : l.qk_dim);
  const CUtensorMap v = latents ? map(l.k, false, latent::kQkDim - latent::kValueDim)
                                : map(l.v, narrow_values(l.cache), l.value_dim);

  clear_report(p, stream);
  enqueue(kernels.attend, blocks, kernels.threads, kernels.shared_bytes, stream,
          {&p, &plan, &q, &k, &v});

  enqueue_combine(kernels.combine, p, plan, l.value_dim, true, stream);
}

}  // namespace blasst::cuda::decode
