#include "cuda/sm90/prefill/kernels.h"

namespace blasst::cuda::prefill {

Kernel find_kernel(Element element, int dim, Variant variant) {
  if (dim == 64) return find_kernel_64(element, variant);
  if (dim == 128) return find_kernel_128(element, variant);
  return find_kernel_256(element, variant);
}

}  // namespace blasst::cuda::prefill
