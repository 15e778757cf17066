// Launching the prefill kernel. No CUDA types, so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/prefill/params.h"
#include "cuda/core/tensor.h"

namespace blasst::cuda::prefill {

struct Launch {
  Params params;  // launch() fills in the work
  Tensor q, k, v;
  Element element;
  int qk_dim, value_dim;  // of queries and keys, of values and outputs
  Scores scores;
  Variant variant;
  int* workspace;  // workspace_bytes() on the device, 16-byte aligned
  void* stream;    // a cudaStream_t
};

// The next item, and room for where the blocks and query tiles of each request begin.
constexpr std::size_t workspace_bytes(int64_t batch) {
  return 16 + 2 * sizeof(int) * (static_cast<std::size_t>(batch) + 1);
}

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

}  // namespace blasst::cuda::prefill
