// Instantiates the kernels of one pair of dimensions, BLASST_QK_DIM and BLASST_VALUE_DIM.
#include "cuda/core/prefill/choose.cuh"
#include "cuda/sm80/prefill/kernel.cuh"
#include "cuda/sm80/prefill/kernels.h"

namespace blasst::cuda::prefill::sm80 {
namespace {

struct Compiled {
  template <typename T, Variant kVariant>
  static Kernel of() {
    using C = Config<T, BLASST_QK_DIM, BLASST_VALUE_DIM, kVariant>;
    return {reinterpret_cast<const void*>(&attend<C>), sizeof(typename C::Shared), C::kThreads};
  }
};

}  // namespace

template <>
Kernel find_kernel_of<BLASST_QK_DIM, BLASST_VALUE_DIM>(Element element, Variant variant) {
  return choose<Compiled>(element, variant);
}

}  // namespace blasst::cuda::prefill::sm80
