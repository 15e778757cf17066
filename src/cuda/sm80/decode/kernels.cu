// Instantiates the kernels of one pair of dimensions, BLASST_QK_DIM and BLASST_VALUE_DIM.
#include <cstddef>

#include "cuda/core/decode/choose.cuh"
#include "cuda/sm80/decode/kernel.cuh"
#include "cuda/sm80/decode/kernels.h"

namespace blasst::cuda::decode::sm80 {
namespace {

struct Compiled {
  template <typename T, int kRows, Variant kVariant>
  static Kernels of() {
    using C = Config<T, BLASST_QK_DIM, BLASST_VALUE_DIM, kRows, kVariant>;
    return {reinterpret_cast<const void*>(&attend<C>), offsetof(typename C::Shared, stages),
            sizeof(typename C::Stage),
            reinterpret_cast<const void*>(&add_splits<T, BLASST_VALUE_DIM>)};
  }
};

}  // namespace

template <>
Kernels find_kernels_of<BLASST_QK_DIM, BLASST_VALUE_DIM>(Element element, int rows,
                                                         Variant variant) {
  return choose<Compiled>(element, rows, variant);
}

}  // namespace blasst::cuda::decode::sm80
