#include "cuda/sm90/decode/kernels.h"

namespace blasst::cuda::decode {

Kernels find_kernels(Element element, int dim, int rows, Variant variant) {
  if (dim == 64) return find_kernels_64(element, rows, variant);
  if (dim == 128) return find_kernels_128(element, rows, variant);
  return find_kernels_256(element, rows, variant);
}

}  // namespace blasst::cuda::decode
