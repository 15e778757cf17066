#include "cuda/core/prefill/widen.h"

#include <algorithm>
#include <utility>

#include "cuda/core/checks.h"
#include "problem/checks.h"
#include "problem/element.h"

namespace blasst::cuda::prefill {
namespace {

constexpr std::size_t round_up(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

Widening plan_widening(std::string_view backend, const AttentionParams& params) {
  problem::check_scalars(params, problem::Phase::kPrefill);
  const blasst_problem& p = params.problem;
  problem::check_types(backend, "prefill", problem::Caches::kOfQueriesOr8Bits, p);
  problem::check_range("batch", p.batch, 0, 65535);  // blocks of a launch
  problem::check_range("kv_heads", p.kv_heads, 1, 65535);
  problem::check_range("the most keys of a request", problem::most_keys(p), 0, kUnlimited - 1);
  const bool ragged = p.kv.layout == BLASST_LAYOUT_RAGGED;
  const int64_t outer = ragged ? 1 : p.batch, tokens = ragged ? p.kv.tokens : problem::most_keys(p);
  const problem::RowTensor from = problem::key_tensor(p);

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
  auto* workspace = static_cast<std::byte*>(params.execution.workspace);
  const auto place = [&](const View& view, int64_t dim, const blasst_scales& scales, View& to) {
    const int64_t elements = outer * tokens * p.kv_heads * dim;
    void* here = workspace ? workspace + w.bytes : nullptr;
    w.bytes += round_up(static_cast<std::size_t>(elements) * 2);
    to = {.data = here,
          .dtype = p.q.dtype,
          .elements = elements,
          .stride_request = tokens * p.kv_heads * dim,
          .stride_token = p.kv_heads * dim,
          .stride_head = dim};
    return Widened{tensor(view, from.outer, from.tokens, p.kv_heads, dim), view.dtype, scales, here,
                   tokens};
  };
  blasst_problem& to = w.params.problem;
  w.k = place(p.kv.k, p.head_dim, p.k_scales, to.kv.k);
  w.v = place(p.kv.v, p.value_dim, p.v_scales, to.kv.v);
  to.k_scales = to.v_scales = {};
  if (p.kv.layout == BLASST_LAYOUT_PAGED) {
    to.kv.layout = BLASST_LAYOUT_DENSE;
    to.kv.key_length = problem::most_keys(p);
    to.kv.page_table = nullptr;
    to.kv.pages = to.kv.page_size = to.kv.page_table_stride = 0;
  }
  Execution& execution = w.params.execution;
  if (workspace) execution.workspace = workspace + w.bytes;
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
