#include "cuda/sm90/prefill/kernels.h"

#include <fmt/format.h>

#include "blasst/blasst.hpp"

namespace blasst::cuda::prefill {

namespace {

template <Scores kScores>
Kernel find(Element element, int qk_dim, int value_dim, Variant variant) {
  const auto is = [&](int qk, int value) { return qk_dim == qk && value_dim == value; };
  if (is(64, 64)) return find_kernel_of<64, 64, kScores>(element, variant);
  if (is(128, 128)) return find_kernel_of<128, 128, kScores>(element, variant);
  if (is(256, 256)) return find_kernel_of<256, 256, kScores>(element, variant);
  throw Error(BLASST_INTERNAL, fmt::format("no kernel of dimensions {} and {}", qk_dim, value_dim));
}

}  // namespace

Kernel find_kernel(Element element, int qk_dim, int value_dim, Scores scores, Variant variant) {
  return scores == Scores::kInt8 ? find<Scores::kInt8>(element, qk_dim, value_dim, variant)
                                 : find<Scores::kExact>(element, qk_dim, value_dim, variant);
}

}  // namespace blasst::cuda::prefill
