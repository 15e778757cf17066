#include "cuda/sm90/backward/kernels.h"

#include "blasst/blasst.hpp"
#include "problem/text.h"

namespace blasst::cuda::backward {

Kernel find_kernel(Element element, int dim, bool capped) {
  switch (dim) {
    case 64:
      return find_kernel_of<64>(element, capped);
    case 128:
      return find_kernel_of<128>(element, capped);
    case 256:
      return find_kernel_of<256>(element, capped);
    default:
      throw Error(BLASST_INTERNAL, formatted("no backward kernel of dimension {}", dim));
  }
}

}  // namespace blasst::cuda::backward
