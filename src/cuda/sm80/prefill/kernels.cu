// Instantiates the kernels of one pair of dimensions, BLASST_QK_DIM and BLASST_VALUE_DIM.
#include "cuda/sm80/prefill/kernel.cuh"
#include "cuda/sm80/prefill/kernels.h"

namespace blasst::cuda::prefill::sm80 {
namespace {

template <typename T, Variant kVariant>
Kernel kernel() {
  using C = Config<T, BLASST_QK_DIM, BLASST_VALUE_DIM, kVariant>;
  return {reinterpret_cast<const void*>(&attend<C>), sizeof(typename C::Shared), C::kThreads};
}

template <typename T>
Kernel kernel(Variant variant) {
  switch (variant) {
    case Variant::kDense:
      return kernel<T, Variant::kDense>();
    case Variant::kSparse:
      return kernel<T, Variant::kSparse>();
    case Variant::kReport:
      return kernel<T, Variant::kReport>();
  }
  __builtin_unreachable();
}

}  // namespace

template <>
Kernel find_kernel_of<BLASST_QK_DIM, BLASST_VALUE_DIM>(Element element, Variant variant) {
  return element == Element::kHalf ? kernel<__half>(variant) : kernel<__nv_bfloat16>(variant);
}

}  // namespace blasst::cuda::prefill::sm80
