// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/core/tensor.h"
#include "cuda/sm90/decode/kernels.h"

namespace blasst::cuda::decode::latent {

Kernels find_kernels(Element element, Variant variant);

}  // namespace blasst::cuda::decode::latent
