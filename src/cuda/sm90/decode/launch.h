// Launching the decode kernels. No CUDA types, so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/decode/params.h"
#include "cuda/core/tensor.h"

namespace blasst::cuda::decode {

struct Launch {
  Params params;
  Tensor q, k, v;
  Element element;  // of queries
  Cache cache;
  int qk_dim, value_dim;  // of queries and keys, of values and outputs
  void* workspace;
  std::size_t workspace_bytes;  // at least what workspace_bytes() says
  void* stream;                 // a cudaStream_t
};

// What a launch of these shapes needs on the device, whatever the lengths. 256-byte aligned.
std::size_t workspace_bytes(int batch, int heads, int kv_heads, int query_length, int key_length,
                            int value_dim);

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

}  // namespace blasst::cuda::decode
