// From the run-time properties of a call to what a kernel is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/core/prefill/launch.h"

namespace blasst::cuda::prefill {

// Compiled::of<T, kVariant>() for the call's.
template <typename Compiled, typename T>
Kernel choose(Variant variant) {
  switch (variant) {
    case Variant::kDense:
      return Compiled::template of<T, Variant::kDense>();
    case Variant::kSparse:
      return Compiled::template of<T, Variant::kSparse>();
    case Variant::kReport:
      return Compiled::template of<T, Variant::kReport>();
  }
  __builtin_unreachable();
}

template <typename Compiled>
Kernel choose(Element element, Variant variant) {
  return element == Element::kHalf ? choose<Compiled, __half>(variant)
                                   : choose<Compiled, __nv_bfloat16>(variant);
}

}  // namespace blasst::cuda::prefill
