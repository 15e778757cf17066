// Launching the backward kernels. No CUDA types, so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/backward/params.h"
#include "cuda/core/tensor.h"

namespace blasst::cuda::backward {

struct Launch {
  Params params;  // launch() fills in the work
  Tensor q, k, v, dout;
  Element element;
  int qk_dim, value_dim;
  void* stream;  // a cudaStream_t
};

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

}  // namespace blasst::cuda::backward
