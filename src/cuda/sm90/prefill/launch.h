// Launching the prefill kernel. No CUDA types, so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/sm90/prefill/params.h"
#include "cuda/sm90/tensor.h"

namespace blasst::cuda::prefill {

struct Launch {
  Params params;  // next_item and the schedule are filled in by launch()
  Tensor q, k, v;
  Element element;
  int dim;  // 64, 128 or 256, of queries, keys and values
  Variant variant;
  int* workspace;  // kWorkspaceBytes on the device
  void* stream;    // a cudaStream_t
};

inline constexpr std::size_t kWorkspaceBytes = 16;

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

}  // namespace blasst::cuda::prefill
