// The CUDA calls that launching needs in both phases. Throws Error.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/sm90/tensor.h"

namespace blasst::cuda {

void check(cudaError_t status, const char* what);

// Zeros, on the stream; nothing where there is no data.
void clear(void* data, std::size_t bytes, cudaStream_t stream);

int multiprocessors();  // of the current device

// Lets the kernel have so much dynamic shared memory.
void allow_shared_memory(const void* kernel, int bytes);

// A dimension of a tensor, as the copy engine walks it.
struct Dimension {
  int64_t size, stride;  // in elements
  int box;               // elements a copy
};

// Boxes of one 64-element panel by the three outer dimensions, in the 128-byte swizzle. Copies
// reach into L2 in pieces of `promotion`.
CUtensorMap tensor_map(const void* data, Element element, int dim,
                       const std::array<Dimension, 3>& outer, CUtensorMapL2promotion promotion);

}  // namespace blasst::cuda
