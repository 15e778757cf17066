// Instantiates the kernels of one pair of dimensions, BLASST_QK_DIM and BLASST_VALUE_DIM, and one
// Cache, BLASST_CACHE.
#include <type_traits>

#include "cuda/core/decode/choose.cuh"
#include "cuda/core/decode/combine.cuh"
#include "cuda/sm90/decode/kernel.cuh"
#include "cuda/sm90/decode/kernels.h"

namespace blasst::cuda::decode {
namespace {

constexpr Cache kCache = Cache::BLASST_CACHE;

struct Compiled {
  template <typename T, int kRows, Variant kVariant>
  static Kernels of() {
    // Where both operands are widened, the queries' type is known when the kernel runs.
    using Multiplied = std::conditional_t<narrow_values(kCache), __half, T>;
    using C = Config<Multiplied, BLASST_QK_DIM, BLASST_VALUE_DIM, kRows, kVariant, kCache>;
    return {reinterpret_cast<const void*>(&attend<C>), sizeof(typename C::Shared),
            C::Layout::kThreads, C::Layout::kBlocks,
            reinterpret_cast<const void*>(&combine<T, BLASST_VALUE_DIM>)};
  }
};

}  // namespace

template <>
Kernels find_kernels_of<BLASST_QK_DIM, BLASST_VALUE_DIM, kCache>(Element element, int rows,
                                                                 Variant variant) {
  return choose<Compiled>(element, rows, variant);
}

}  // namespace blasst::cuda::decode
