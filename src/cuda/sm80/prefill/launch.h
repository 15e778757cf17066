// Launching the prefill kernel. No CUDA types, so that any host code may include it.
#pragma once

#include "cuda/core/prefill/launch.h"

namespace blasst::cuda::prefill::sm80 {

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

}  // namespace blasst::cuda::prefill::sm80
