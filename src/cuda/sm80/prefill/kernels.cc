#include "cuda/sm80/prefill/kernels.h"

#include "blasst/blasst.hpp"
#include "problem/text.h"

namespace blasst::cuda::prefill::sm80 {

Kernel find_kernel(Element element, int qk_dim, int value_dim, Variant variant) {
  const auto is = [&](int qk, int value) { return qk_dim == qk && value_dim == value; };
  if (is(64, 64)) return find_kernel_of<64, 64>(element, variant);
  if (is(96, 64)) return find_kernel_of<96, 64>(element, variant);
  if (is(96, 96)) return find_kernel_of<96, 96>(element, variant);
  if (is(128, 128)) return find_kernel_of<128, 128>(element, variant);
  if (is(192, 128)) return find_kernel_of<192, 128>(element, variant);
  if (is(256, 256)) return find_kernel_of<256, 256>(element, variant);
  throw Error(BLASST_INTERNAL, formatted("no kernel of dimensions {} and {}", qk_dim, value_dim));
}

}  // namespace blasst::cuda::prefill::sm80
