#include "cuda/sm90/prefill/kernels.h"

#include "blasst/blasst.hpp"
#include "problem/text.h"

namespace blasst::cuda::prefill {

Kernel find_kernel(Element element, int qk_dim, int value_dim, Scores scores, Variant variant) {
  const bool int8 = scores == Scores::kInt8;
  const auto is = [&](int qk, int value) { return qk_dim == qk && value_dim == value; };
  const auto of = [&](auto exact, auto rounded) {
    return (int8 ? rounded : exact)(element, variant);
  };
  if (is(64, 64))
    return of(find_kernel_of<64, 64, Scores::kExact>, find_kernel_of<64, 64, Scores::kInt8>);
  if (is(128, 128))
    return of(find_kernel_of<128, 128, Scores::kExact>, find_kernel_of<128, 128, Scores::kInt8>);
  if (is(256, 256))
    return of(find_kernel_of<256, 256, Scores::kExact>, find_kernel_of<256, 256, Scores::kInt8>);
  if (is(192, 128) && !int8) return find_kernel_of<192, 128, Scores::kExact>(element, variant);
  throw Error(BLASST_INTERNAL, formatted("no kernel of dimensions {} and {}", qk_dim, value_dim));
}

}  // namespace blasst::cuda::prefill
