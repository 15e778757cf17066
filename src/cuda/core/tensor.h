// What the kernels of both phases are launched with. No CUDA types here.
#pragma once

#include <cstdint>

#include "blasst/blasst.hpp"

namespace blasst::cuda {

inline constexpr int kUnlimited = 1 << 29;  // beyond every length, and twice it fits in an int

enum class Element { kBFloat16, kHalf, kInt8 };

constexpr int bytes_of(Element element) { return element == Element::kInt8 ? 1 : 2; }

// A tensor [outer, tokens, heads, dim] on the device: data 16-byte aligned, strides in elements
// that make every row 16-byte aligned, too.
struct Tensor {
  const void* data;
  int64_t outer, tokens, heads, dim;
  int64_t stride_outer, stride_token, stride_head;
};

inline Tensor tensor(const View& view, int64_t outer, int64_t tokens, int64_t heads, int64_t dim) {
  return {view.data,         outer,           tokens, heads, dim, view.stride_request,
          view.stride_token, view.stride_head};
}

}  // namespace blasst::cuda
