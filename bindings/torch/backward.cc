// torch.ops.blasst.prefill_backward: gradients of prefill.
#include <tuple>
#include <utility>
#include <vector>

#include "blasst/blasst.hpp"
#include "problem.h"
#include "tensors.h"

namespace {

using namespace blasst::binding;

std::tuple<Tensor, Tensor, Tensor, Tensor> prefill_backward(Tensor dout, OptionalTensor dlse,
                                                            Tensor q, Tensor k, Tensor v,
                                                            Tensor out, Tensor lse,
                                                            OptionalTensor bits, BLASST_ARGUMENTS,
                                                            std::optional<int64_t> max_seqlen_q,
                                                            std::optional<int64_t> max_seqlen_k) {
  Arguments a = BLASST_ARGUMENTS_GIVEN;
  const Place place(a.q);
  blasst::BackwardParams params{.problem = describe(a, Phase::kPrefill),
                                .execution = place.execution()};
  blasst::Problem& p = params.problem;
  blasst::Gradients& g = params.gradients;
  check_devices("q", a.q,
                {{"dout", &dout},
                 {"dlse", pointer(dlse)},
                 {"out", &out},
                 {"lse", &lse},
                 {"bits", pointer(bits)}});
  std::vector<int64_t> out_shape = shape_of(a.q);
  out_shape.back() = p.value_dim;
  for (const auto& [name, t] : {std::pair{"out", &out}, std::pair{"dout", &dout}}) {
    check_shape(name, *t, "[..., heads, value_dim], rows like q's", out_shape);
    check_type(name, *t, a.q.scalar_type());
    *t = a.q.is_cuda() ? aligned(*t) : readable(*t);
  }
  p.out = view_of(out);
  check_blocks({.problem = p, .execution = params.execution}, Phase::kPrefill, a.blocks);

  g.dout = view_of(dout);
  OptionalTensor known_lse = lse;
  g.lse = floats("lse", known_lse, "[heads, rows]", {p.heads, a.rows()});
  g.dlse = floats("dlse", dlse, "[heads, rows]", {p.heads, a.rows()});
  const Tensor dq = new_like(a.q), dk = new_like(a.k), dv = new_like(a.v);
  const Tensor dsinks =
      torch::stable::new_empty(a.q, std::vector<int64_t>{a.sinks ? p.heads : 0}, ScalarType::Float);
  g.dq = view_of(dq);
  g.dk = view_of(dk);
  g.dv = view_of(dv);
  if (a.sinks) g.dsinks = dsinks.mutable_data_ptr<float>();
  const blasst::Plan plan = blasst::backward_plan(params);
  if (bits) {
    const int64_t words = bit_words(plan);
    check(bits->dim() == 1 && bits->size(0) == words, "bits is ", *bits, "; it must be [", words,
          "], as prefill returned them");
    check_type("bits", *bits, ScalarType::Int);
    bits = torch::stable::contiguous(*bits);
    g.tile_bits = static_cast<const uint32_t*>(bits->const_data_ptr());
  }
  Tensor workspace;
  if (a.q.is_cuda()) {
    // Freed at the end of this call, and reused by torch only behind it on the stream.
    const auto bytes = static_cast<int64_t>(plan.workspace_bytes);
    workspace = torch::stable::new_empty(a.q, std::vector<int64_t>{bytes}, ScalarType::Byte);
    params.execution.workspace = workspace.mutable_data_ptr();
    params.execution.workspace_bytes = plan.workspace_bytes;
  }
  blasst::backward(params);
  return {dq, dk, dv, dsinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blasst, m) {
  m.def(
      "prefill_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor lse, Tensor? bits, Tensor? starts, Tensor? lengths, Tensor? query_lengths,"
      " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, float scale,"
      " float softcap, Tensor? sinks, bool causal, int window_left, int window_right,"
      " Tensor? bands, Tensor? blocks, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
}

STABLE_TORCH_LIBRARY_IMPL(blasst, CPU, m) {
  m.impl("prefill_backward", TORCH_BOX(Kernel<prefill_backward>::call));
}

STABLE_TORCH_LIBRARY_IMPL(blasst, CUDA, m) {
  m.impl("prefill_backward", TORCH_BOX(Kernel<prefill_backward>::call));
}
