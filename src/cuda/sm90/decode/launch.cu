#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "blasst/blasst.hpp"
#include "cuda/core/decode/splits.h"
#include "cuda/core/runtime.h"
#include "cuda/sm90/core/tensor_map.h"
#include "cuda/sm90/decode/kernels.h"
#include "cuda/sm90/decode/latent/kernels.h"
#include "cuda/sm90/decode/latent/layout.cuh"
#include "cuda/sm90/decode/latent/shape.h"
#include "cuda/sm90/decode/launch.h"
#include "cuda/sm90/decode/layout.cuh"
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

// The part of the plan that the shapes decide.
Plan make_plan(int batch, int heads, int kv_heads, int query_length, int key_length,
               int value_dim) {
  Plan plan{};
  plan.rows = heads / kv_heads * query_length;
  const SplitRule rule = split_rule(plan.rows, kv_heads, value_dim);
  plan.least_split_tiles = rule.least_tiles;
  plan.most_splits = rule.most;
  const int splits = split_slots(key_length, plan.least_split_tiles, plan.most_splits);
  plan.item_splits =
      latent::is_latent(value_dim)
          ? 1
          : item_splits(batch, kv_heads, ceil_div(key_length, kTileKeys), plan.rows, value_dim);
  plan.item_slots = ceil_div(splits, plan.item_splits);
  const int64_t items = int64_t{batch} * kv_heads * plan.item_slots;
  if (items > 1 << 30)
    throw Error(BLASST_UNSUPPORTED, "decode of batch " + std::to_string(batch) + " has " +
                                        std::to_string(items) + " work items; at most " +
                                        std::to_string(1 << 30) + " are supported");
  plan.items = static_cast<int>(items);
  return plan;
}

// Places the plan's arrays in the workspace; returns the end of the last.
std::size_t place(Plan& plan, int value_dim, std::byte* workspace) {
  std::size_t at = 0;
  const auto take = [&](std::size_t bytes) {
    std::byte* here = workspace + at;
    at += (bytes + 255) / 256 * 256;
    return here;
  };
  const std::size_t rows = std::size_t(plan.items) * plan.rows;
  plan.partial = reinterpret_cast<float*>(take(rows * value_dim * sizeof(float)));
  plan.statistics = reinterpret_cast<float*>(take(rows * kStatistics * sizeof(float)));
  plan.dropped = reinterpret_cast<int*>(take(std::size_t(plan.items) * sizeof(int)));
  plan.next_item = reinterpret_cast<int*>(take(sizeof(int)));
  return at;
}

// How a launch's items are dealt out to `most_blocks` blocks.
Plan plan_chunks(Plan plan, int most_blocks) {
  const int blocks = std::min(plan.items, most_blocks);
  plan.chunk = chunk_items(plan.items, blocks);
  if (blocks * plan.chunk >= plan.items) plan.next_item = nullptr;
  return plan;
}

// The same of latents: an item is several splits, each with a result of its own.
Plan latent_work(Plan plan, const Params& p, int most_blocks) {
  const int tiles = ceil_div(p.keys.length, kTileKeys);
  const int64_t pairs = int64_t{p.batch} * p.kv_heads;
  plan.item_splits = latent::splits_of_item(
      pairs, plan.item_slots, split_tiles(tiles, plan.least_split_tiles, plan.most_splits),
      most_blocks);
  plan.item_slots = ceil_div(plan.item_slots, plan.item_splits);
  plan.items = static_cast<int>(pairs * plan.item_slots);
  plan.chunk = 1;
  if (most_blocks >= plan.items) plan.next_item = nullptr;
  return plan;
}

Variant variant_of(const Params& p) {
  if (p.report.tile_bits || p.report.gap_histogram || p.report.dropped_mass_bound)
    return Variant::kReport;
  return p.test.kind == BLASST_TEST_NONE ? Variant::kDense : Variant::kSparse;
}

void clear_report(const Params& p, cudaStream_t stream) {
  const auto heads = static_cast<std::size_t>(p.heads);
  clear(p.report.tile_bits,
        sizeof(*p.report.tile_bits) * p.kv_heads * p.batch * std::size_t(p.report.tile_words),
        stream);
  clear(p.report.gap_histogram, sizeof(*p.report.gap_histogram) * heads * BLASST_GAP_BINS, stream);
}

}  // namespace

std::size_t workspace_bytes(int batch, int heads, int kv_heads, int query_length, int key_length,
                            int value_dim) {
  Plan plan = make_plan(batch, heads, kv_heads, query_length, key_length, value_dim);
  return place(plan, value_dim, nullptr);
}

// All that can fail on the host comes before the first write.
void launch(const Launch& l) {
  Params p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  if (p.batch == 0) return clear_report(p, stream);
  Plan plan = make_plan(p.batch, p.heads, p.kv_heads, p.query_length, p.keys.length, l.value_dim);
  const std::size_t needed = place(plan, l.value_dim, static_cast<std::byte*>(l.workspace));
  if (l.workspace_bytes < needed)
    throw Error(BLASST_INVALID_ARGUMENT, "workspace_bytes is " + std::to_string(l.workspace_bytes) +
                                             "; this call needs " + std::to_string(needed));
  plan.box_tokens = p.keys.page_table ? std::min(p.keys.page_size, kTileKeys) : kTileKeys;
  plan.half_queries = l.element == Element::kHalf;
  plan.unit_scale = p.softcap > 0 ? 1.0f : p.scale;

  const CUtensorMap q = map_of(l.q, l.element, p.heads / p.kv_heads, p.query_length);
  // Without keys nothing is copied; any tensor will do.
  const bool keys_at_all = p.keys.length > 0 && l.k.tokens > 0 && l.k.outer > 0;
  const Element of_keys = l.cache == Cache::kOfQueries ? l.element : Element::kInt8;  // any byte
  const CUtensorMap k = map_of(keys_at_all ? l.k : l.q, of_keys, 1, plan.box_tokens);
  const CUtensorMap v = map_of(keys_at_all ? l.v : l.q, of_keys, 1, plan.box_tokens);

  const bool latents = latent::is_latent(l.value_dim);
  const Kernels kernels =
      latents ? latent::find_kernels(l.element, variant_of(p))
              : find_kernels(l.element, l.cache, l.qk_dim, l.value_dim, plan.rows, variant_of(p));
  allow_shared_memory(kernels.attend, kernels.shared_bytes);
  allow_shared_memory(kernels.combine, 0);  // loads it
  const int most_blocks = multiprocessors() * kernels.blocks;
  const Plan work = latents ? latent_work(plan, p, most_blocks) : plan_chunks(plan, most_blocks);
  const int blocks = std::min(work.items, most_blocks);

  clear_report(p, stream);
  clear(work.next_item, sizeof(int), stream);
  if (latents)
    enqueue(kernels.attend, blocks, latent::kBlockThreads, kernels.shared_bytes, stream,
            {&p, &work, &plan.item_slots, &q, &k});
  else
    enqueue(kernels.attend, blocks, kThreads, kernels.shared_bytes, stream,
            {&p, &work, &q, &k, &v});

  // The combining kernel is set up while the attention kernel runs, and waits for its results.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  const int slices = p.batch * p.kv_heads * plan.rows * combine_slices(l.value_dim);
  const int warps = combine_warps(slices);
  config.gridDim = dim3(adds_in_warp(plan) ? ceil_div(slices, warps) : slices);
  config.blockDim = dim3(32 * warps);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  void* arguments[] = {&p, &plan};
  check(cudaLaunchKernelExC(&config, kernels.combine, arguments), "cudaLaunchKernelExC");
}

}  // namespace blasst::cuda::decode
