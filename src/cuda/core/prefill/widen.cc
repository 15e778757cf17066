#include "cuda/core/prefill/widen.h"

#include <algorithm>
#include <utility>

#include "cuda/core/checks.h"
#include "problem/checks.h"
#include "problem/element.h"

namespace blasst::cuda::prefill {
namespace {

constexpr std::size_t round_up(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// A tensor of the call in the new one, as `type`: of the workspace if it must be copied. `w` has
// the call as it was given, and the bytes that are taken.
Widened place(Widening& w, const View& view, int64_t dim, const blasst_scales& scales, DType type,
              View& to) {
  const blasst_problem& p = w.params.problem;
  const problem::RowTensor from = problem::key_tensor(p);
  const bool ragged = p.kv.layout == BLASST_LAYOUT_RAGGED;
  const int64_t outer = ragged ? 1 : p.batch, tokens = ragged ? p.kv.tokens : problem::most_keys(p);
  Widened t{.from = tensor(view, from.outer, from.tokens, p.kv_heads, dim),
            .type = view.dtype,
            .to_type = type,
            .scales = scales,
            .to = nullptr,
            .tokens = tokens};
  if (view.dtype == type && p.kv.layout != BLASST_LAYOUT_PAGED) return t;
  auto* workspace = static_cast<std::byte*>(w.params.execution.workspace);
  const int64_t elements = outer * tokens * p.kv_heads * dim;
  t.to = workspace ? workspace + w.bytes : nullptr;
  w.bytes += round_up(static_cast<std::size_t>(elements * problem::element_bytes(type)));
  to = {.data = t.to,
        .dtype = type,
        .elements = elements,
        .stride_request = tokens * p.kv_heads * dim,
        .stride_token = p.kv_heads * dim,
        .stride_head = dim};
  return t;
}

}  // namespace

Widening plan_widening(std::string_view backend, const AttentionParams& params) {
  problem::check_scalars(params, problem::Phase::kPrefill);
  const blasst_problem& p = params.problem;
  problem::check_types(backend, "prefill", problem::Caches::kOfQueriesOr8Bits, p);
  problem::check_range("batch", p.batch, 0, 65535);  // blocks of a launch
  problem::check_range("kv_heads", p.kv_heads, 1, 65535);
  problem::check_range("the most keys of a request", problem::most_keys(p), 0, kUnlimited - 1);
  Widening w{};
  w.params = params;
  w.batch = static_cast<int>(p.batch), w.kv_heads = static_cast<int>(p.kv_heads);
  w.element = p.q.dtype;
  w.keys = {.length = static_cast<int>(problem::most_keys(p)),
            .starts = p.kv.starts,
            .lengths = p.kv.lengths,
            .cu_seqlens = p.kv.cu_seqlens,
            .page_table = p.kv.page_table,
            .page_table_stride = p.kv.page_table_stride,
            .page_size = static_cast<int>(p.kv.page_size),
            .pages = static_cast<int>(p.kv.pages)};
  blasst_problem& to = w.params.problem;
  const bool takes_bytes = problem::scores_take_bytes(params.decision.scores, p.kv.k.dtype);
  const DType key_type = takes_bytes ? BLASST_INT8 : p.q.dtype;
  w.k = place(w, p.kv.k, p.head_dim, p.k_scales, key_type, to.kv.k);
  w.v = place(w, p.kv.v, p.value_dim, p.v_scales, p.q.dtype, to.kv.v);
  if (!takes_bytes) to.k_scales = {};
  to.v_scales = {};
  if (p.kv.layout == BLASST_LAYOUT_PAGED) {
    to.kv.layout = BLASST_LAYOUT_DENSE;
    to.kv.key_length = problem::most_keys(p);
    to.kv.page_table = nullptr;
    to.kv.pages = to.kv.page_size = to.kv.page_table_stride = 0;
  }
  Execution& execution = w.params.execution;
  if (execution.workspace)
    execution.workspace = static_cast<std::byte*>(execution.workspace) + w.bytes;
  execution.workspace_bytes -= std::min(execution.workspace_bytes, w.bytes);
  return w;
}

void check_widening(std::string_view backend, const AttentionParams& params) {
  problem::check_arrays(params);
  check_key_views(backend, params.problem);
  for (const auto& [name, view] :
       {std::pair{"k", &params.problem.kv.k}, std::pair{"v", &params.problem.kv.v}})
    problem::check_not_shared("out", params.problem.out, name, *view);
}

}  // namespace blasst::cuda::prefill
