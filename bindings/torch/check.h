// Checks of tensors, with messages that say what was passed and what is accepted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "blasst/blasst.hpp"

namespace blasst::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void put(std::ostream& s, std::string_view text) { s << text; }
inline void put(std::ostream& s, int64_t number) { s << number; }
inline void put(std::ostream& s, ScalarType type) { s << torch::headeronly::toString(type); }
inline void put(std::ostream& s, std::span<const int64_t> shape) {
  s << '[';
  for (size_t i = 0; i < shape.size(); ++i) s << (i == 0 ? "" : ", ") << shape[i];
  s << ']';
}
inline void put(std::ostream& s, const Tensor& t) {
  put(s, std::span(t.sizes().data(), t.sizes().size()));
}

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (put(message, args), ...);
  throw std::runtime_error(message.str());
}

template <typename... Args>
void check(bool ok, const Args&... args) {
  if (!ok) fail(args...);
}

inline void check_shape(std::string_view name, const Tensor& t, std::string_view meaning,
                        const std::vector<int64_t>& shape) {
  check(std::ranges::equal(t.sizes(), shape), name, " is ", t, "; it must be ", meaning, " = ",
        std::span(shape));
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return BLASST_FLOAT32;
    case ScalarType::Half:
      return BLASST_FLOAT16;
    case ScalarType::BFloat16:
      return BLASST_BFLOAT16;
    default:
      fail("q is ", t.scalar_type(), "; blasst takes float32, float16 and bfloat16");
  }
}

inline int64_t element_bytes(DType dtype) { return dtype == BLASST_FLOAT32 ? 4 : 2; }

template <typename Enum, size_t n>
Enum choose(std::string_view name, std::string_view value,
            const std::array<std::pair<std::string_view, Enum>, n>& choices) {
  std::string accepted;
  for (const auto& [choice, result] : choices) {
    if (choice == value) return result;
    accepted.append(accepted.empty() ? "" : ", ").append(choice);
  }
  fail(name, " is '", value, "'; it must be one of ", accepted);
}

// Tensors whose last dimension is not contiguous are copied; everything else is read in place.
inline Tensor readable(const Tensor& t) {
  return t.numel() == 0 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace blasst::binding
