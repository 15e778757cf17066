// The part of a launch that both phases plan alike. `Launch` is prefill's or decode's. Throws
// Error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "blasst/blasst.hpp"
#include "cuda/core/checks.h"
#include "cuda/core/tensor.h"
#include "problem/checks.h"
#include "problem/text.h"
#include "problem/tiles.h"

namespace blasst::cuda {

// Elements of queries and keys, and of values and outputs.
struct HeadSizes {
  int64_t qk, value;
};

inline void check_head_sizes(std::string_view backend, const blasst_problem& p,
                             std::span<const HeadSizes> supported) {
  std::string list;
  for (const auto [qk, value] : supported) {
    if (p.head_dim == qk && p.value_dim == value) return;
    list += formatted("{}{}/{}", list.empty() ? "" : ", ", qk, value);
  }
  refuse(backend, "head_dim is {} and value_dim {}; of these two it does {}", p.head_dim,
         p.value_dim, list);
}

// The scalars of a call that both phases look at, and the types and sizes that the kernels have.
inline void check_supported(std::string_view backend, const AttentionParams& params,
                            problem::Phase phase, std::span<const HeadSizes> sizes,
                            problem::Caches caches) {
  problem::check_scalars(params, phase);
  const blasst_problem& p = params.problem;
  const bool decode = phase == problem::Phase::kDecode;
  problem::check_types(backend, decode ? "decode" : "prefill", caches, p);
  if (decode) problem::check_exact_scores(backend, "decode", params.decision);
  if (p.q.dtype == BLASST_FLOAT32) refuse(backend, "q is float32; it does bfloat16 and float16");
  check_head_sizes(backend, p, sizes);
  if (p.kv.layout == BLASST_LAYOUT_PAGED) check_page_size(backend, p.kv);
  if (p.mask.blocks) refuse(backend, "mask.blocks is set; it has no block masks");
  if (params.execution.threads != 0)
    refuse(backend, "threads is {}; it must be 0", params.execution.threads);
  const auto [outer, tokens] = problem::key_tensor(p);
  for (const auto& [name, count] :
       {std::pair{"the most keys of a request", problem::most_keys(p)},
        std::pair{"tokens of k", tokens}, std::pair{"rows of all requests", problem::all_rows(p)},
        std::pair{"kv.pages", p.kv.pages}})
    problem::check_range(name, count, 0, kUnlimited - 1);
}

template <typename Launch>
void plan_shapes(Launch& l, const AttentionParams& params) {
  const blasst_problem& p = params.problem;
  l.element = p.q.dtype == BLASST_FLOAT16 ? Element::kHalf : Element::kBFloat16;
  l.qk_dim = static_cast<int>(p.head_dim);
  l.value_dim = static_cast<int>(p.value_dim);
  l.params.batch = static_cast<int>(p.batch);
  l.params.heads = static_cast<int>(p.heads);
  l.params.kv_heads = static_cast<int>(p.kv_heads);
  l.params.query_length = static_cast<int>(problem::most_rows(p));
  l.params.keys.length = static_cast<int>(problem::most_keys(p));
  l.stream = params.execution.stream;
}

template <typename Launch>
void plan_queries(std::string_view backend, Launch& l, const blasst_problem& p) {
  const auto [outer, tokens] = problem::query_tensor(p);
  problem::check_view("q", p.q, outer, tokens, p.heads, p.head_dim);
  problem::check_view("out", p.out, outer, tokens, p.heads, p.value_dim);
  check_aligned(backend, "q", p.q);
  check_aligned(backend, "out", p.out);
  if (outer > 0 && tokens > 0)
    problem::check_no_overlap("out", p.out, outer, tokens, p.heads, p.value_dim);
  problem::check_not_shared("out", p.out, "q", p.q);
  problem::check_not_shared("out", p.out, "k", p.kv.k);
  problem::check_not_shared("out", p.out, "v", p.kv.v);
  l.q = tensor(p.q, outer, tokens, p.heads, p.head_dim);
  l.params.out = {p.out.data, p.out.stride_request, p.out.stride_token, p.out.stride_head};
}

template <typename Launch>
void plan_keys(std::string_view backend, Launch& l, const blasst_problem& problem) {
  auto& p = l.params;
  const KeysValues& kv = problem.kv;
  check_key_views(backend, problem);
  const auto [outer, tokens] = problem::key_tensor(problem);
  l.k = tensor(kv.k, outer, tokens, problem.kv_heads, problem.head_dim);
  l.v = tensor(kv.v, outer, tokens, problem.kv_heads, problem.value_dim);
  p.keys.starts = kv.starts;
  p.keys.lengths = kv.lengths;
  p.keys.cu_seqlens = kv.cu_seqlens;
  p.keys.page_table = kv.page_table;
  p.keys.page_table_stride = kv.page_table_stride;
  p.keys.page_size = static_cast<int>(kv.page_size);
  p.keys.pages = static_cast<int>(kv.pages);
}

inline float scale_of(const blasst_problem& p) {
  return p.scale > 0 ? p.scale : 1 / std::sqrt(static_cast<float>(p.head_dim));
}

template <typename KernelParams>
void plan_mask_and_test(KernelParams& p, const AttentionParams& params) {
  p.softcap = params.problem.softcap;
  p.sinks = params.problem.sinks;
  const problem::Distances d = problem::allowed_distances(params.problem.mask, nullptr);
  constexpr int64_t limit = kUnlimited;
  p.distances.least = static_cast<int>(std::clamp(d.least, -limit, limit));
  p.distances.most = static_cast<int>(std::clamp(d.most, -limit, limit));
  const TileTest& test = params.decision.test;
  p.order = params.decision.order;
  p.test.kind = test.kind;
  p.test.values = test.values;
  p.test.stride_request = test.stride_request;
  p.test.stride_head = test.stride_head;
}

template <typename KernelParams>
void plan_report(KernelParams& p, const Report& report, const problem::Geometry& geometry) {
  p.report.lse = report.lse;
  p.report.dropped_mass_bound = report.dropped_mass_bound;
  p.report.visitable = reinterpret_cast<unsigned long long*>(report.tiles_visitable);
  p.report.skipped = reinterpret_cast<unsigned long long*>(report.tiles_skipped);
  p.report.tile_bits = report.tile_bits;
  p.report.tile_words = static_cast<int>(geometry.tile_words);
  p.report.gap_histogram = reinterpret_cast<unsigned long long*>(report.gap_histogram);
}

// The caller's workspace, which the plan says the size of.
inline void check_workspace(std::string_view backend, const Execution& execution,
                            std::size_t needed, std::size_t alignment) {
  if (execution.workspace_bytes < needed)
    problem::fail("workspace has {} bytes; a {} call allocates nothing and this one needs {}",
                  execution.workspace_bytes, backend, needed);
  if (reinterpret_cast<uintptr_t>(execution.workspace) % alignment != 0)
    problem::fail("workspace is {}; it must be {}-byte aligned", execution.workspace, alignment);
}

}  // namespace blasst::cuda
