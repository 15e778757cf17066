#include "cuda/sm90/backward/kernels.h"

#include "blasst/blasst.hpp"
#include "problem/text.h"

namespace blasst::cuda::backward {

Kernel find_kernel(Element element, int qk_dim, int value_dim, bool capped) {
  const auto is = [&](int qk, int value) { return qk_dim == qk && value_dim == value; };
  if (is(64, 64)) return find_kernel_of<64, 64>(element, capped);
  if (is(128, 128)) return find_kernel_of<128, 128>(element, capped);
  if (is(192, 128)) return find_kernel_of<192, 128>(element, capped);
  if (is(256, 256)) return find_kernel_of<256, 256>(element, capped);
  throw Error(BLASST_INTERNAL,
              formatted("no backward kernel of dimensions {} and {}", qk_dim, value_dim));
}

}  // namespace blasst::cuda::backward
