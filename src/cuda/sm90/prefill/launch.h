// Launching the prefill kernel. No CUDA types, so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/sm90/prefill/params.h"
#include "cuda/sm90/tensor.h"

namespace blasst::cuda::prefill {

struct Launch {
  Params params;  // launch() fills in the work
  Tensor q, k, v;
  Element element;
  int dim;  // 64, 128 or 256, of queries, keys and values
  Variant variant;
  int* workspace;  // workspace_bytes() on the device
  void* stream;    // a cudaStream_t
};

// The next item, and, where requests differ in rows, where the blocks and query tiles of each
// begin.
constexpr std::size_t workspace_bytes(const Params& p) {
  return 16 + (rows_differ(p) ? 2 * sizeof(int) * (static_cast<std::size_t>(p.batch) + 1) : 0);
}

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

}  // namespace blasst::cuda::prefill
