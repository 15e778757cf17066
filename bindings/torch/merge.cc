// torch.ops.blasst.merge: one attention over two sets of keys.
#include <tuple>
#include <utility>

#include "blasst/blasst.hpp"
#include "problem.h"
#include "tensors.h"

namespace {

using namespace blasst::binding;

// Rows are [batch, query_length] or ragged; lse [heads, rows].
std::tuple<Tensor, Tensor> merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  check_devices("out_a", out_a, {{"lse_a", &lse_a}, {"out_b", &out_b}, {"lse_b", &lse_b}});
  check(out_a.dim() == 3 || out_a.dim() == 4, "out_a is ", out_a,
        "; it must be [batch, query_length, heads, value_dim] or [rows, heads, value_dim]");
  check(std::ranges::equal(out_b.sizes(), out_a.sizes()), "out_b is ", out_b, ", but out_a is ",
        out_a);
  const Place place(out_a);
  blasst::MergeParams p{.execution = place.execution()};
  dtype_of("out_a", out_a);
  check_type("out_b", out_b, out_a.scalar_type());
  const bool ragged = out_a.dim() == 3;
  p.batch = ragged ? 1 : out_a.size(0);
  p.query_length = out_a.size(out_a.dim() - 3);
  p.heads = out_a.size(out_a.dim() - 2);
  p.value_dim = out_a.size(out_a.dim() - 1);
  OptionalTensor known_a = lse_a, known_b = lse_b;
  p.lse_a = floats("lse_a", known_a, "[heads, rows]", {p.heads, p.batch * p.query_length});
  p.lse_b = floats("lse_b", known_b, "[heads, rows]", {p.heads, p.batch * p.query_length});
  out_a = readable(out_a);
  out_b = readable(out_b);
  const Tensor out = new_like(out_a), lse = new_like(lse_a);
  p.out_a = view_of(out_a);
  p.out_b = view_of(out_b);
  p.out = view_of(out);
  p.lse = lse.mutable_data_ptr<float>();
  blasst::merge(p);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blasst, m) {
  m.def(
      "merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(blasst, CPU, m) { m.impl("merge", TORCH_BOX(Kernel<merge>::call)); }
STABLE_TORCH_LIBRARY_IMPL(blasst, CUDA, m) { m.impl("merge", TORCH_BOX(Kernel<merge>::call)); }
