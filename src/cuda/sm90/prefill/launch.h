// Launching the prefill kernel. No CUDA types, so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/sm90/prefill/params.h"

namespace blasst::cuda::prefill {

// A tensor [outer, tokens, heads, dim] on the device, read through the copy engine: data 16-byte
// aligned, strides in elements that make every row 16-byte aligned, too.
struct Tensor {
  const void* data;
  int64_t outer, tokens, heads;
  int64_t stride_outer, stride_token, stride_head;
};

enum class Element { kBFloat16, kHalf };

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
