#include "cuda/sm80/decode/kernels.h"

#include "blasst/blasst.hpp"
#include "problem/text.h"

namespace blasst::cuda::decode::sm80 {

Kernels find_kernels(Element element, int qk_dim, int value_dim, int rows, Variant variant) {
  const auto is = [&](int qk, int value) { return qk_dim == qk && value_dim == value; };
  if (is(64, 64)) return find_kernels_of<64, 64>(element, rows, variant);
  if (is(96, 64)) return find_kernels_of<96, 64>(element, rows, variant);
  if (is(96, 96)) return find_kernels_of<96, 96>(element, rows, variant);
  if (is(128, 128)) return find_kernels_of<128, 128>(element, rows, variant);
  if (is(192, 128)) return find_kernels_of<192, 128>(element, rows, variant);
  if (is(256, 256)) return find_kernels_of<256, 256>(element, rows, variant);
  throw Error(BLASST_INTERNAL, formatted("no kernel of dimensions {} and {}", qk_dim, value_dim));
}

}  // namespace blasst::cuda::decode::sm80
