// Launching the decode kernels. No CUDA types, so that any host code may include it.
#pragma once

#include "cuda/core/decode/launch.h"

namespace blasst::cuda::decode {

// What a launch of these shapes needs on the device, whatever the lengths. 256-byte aligned.
std::size_t workspace_bytes(int batch, int heads, int kv_heads, int query_length, int key_length,
                            int value_dim);

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

}  // namespace blasst::cuda::decode
