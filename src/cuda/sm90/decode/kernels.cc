#include "cuda/sm90/decode/kernels.h"

#include "blasst/blasst.hpp"
#include "problem/text.h"

namespace blasst::cuda::decode {

Kernels find_kernels(Element element, Cache cache, int qk_dim, int value_dim, int rows,
                     Variant variant) {
  const auto is = [&](int qk, int value, Cache of) {
    return qk_dim == qk && value_dim == value && cache == of;
  };
  if (is(64, 64, Cache::kOfQueries))
    return find_kernels_of<64, 64, Cache::kOfQueries>(element, rows, variant);
  if (is(64, 64, Cache::kInt8))
    return find_kernels_of<64, 64, Cache::kInt8>(element, rows, variant);
  if (is(64, 64, Cache::kFloat8))
    return find_kernels_of<64, 64, Cache::kFloat8>(element, rows, variant);
  if (is(128, 128, Cache::kOfQueries))
    return find_kernels_of<128, 128, Cache::kOfQueries>(element, rows, variant);
  if (is(128, 128, Cache::kInt8))
    return find_kernels_of<128, 128, Cache::kInt8>(element, rows, variant);
  if (is(128, 128, Cache::kFloat8))
    return find_kernels_of<128, 128, Cache::kFloat8>(element, rows, variant);
  if (is(128, 128, Cache::kInt8Keys))
    return find_kernels_of<128, 128, Cache::kInt8Keys>(element, rows, variant);
  if (is(192, 128, Cache::kOfQueries))
    return find_kernels_of<192, 128, Cache::kOfQueries>(element, rows, variant);
  if (is(256, 256, Cache::kOfQueries))
    return find_kernels_of<256, 256, Cache::kOfQueries>(element, rows, variant);
  if (is(256, 256, Cache::kInt8))
    return find_kernels_of<256, 256, Cache::kInt8>(element, rows, variant);
  if (is(256, 256, Cache::kFloat8))
    return find_kernels_of<256, 256, Cache::kFloat8>(element, rows, variant);
  throw Error(BLASST_INTERNAL, formatted("no kernel of dimensions {} and {} and cache {}", qk_dim,
                                         value_dim, static_cast<int>(cache)));
}

}  // namespace blasst::cuda::decode
