// Tensors of an operator: what is checked of them, with messages that say what was passed and what
// is accepted, and the views that the core takes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <optional>
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
using OptionalTensor = std::optional<Tensor>;

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

// torch makes a RuntimeError of whatever an operator throws. The message begins with the name of
// the Python exception that it is meant to be, which the Python package raises instead.
template <typename... Args>
[[noreturn]] void raise(std::string_view python_exception, const Args&... args) {
  std::ostringstream message;
  message << python_exception << ": ";
  (put(message, args), ...);
  throw std::runtime_error(message.str());
}

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  raise("ValueError", args...);
}

template <typename... Args>
void check(bool ok, const Args&... args) {
  if (!ok) fail(args...);
}

// A function as torch calls it: TORCH_BOX(Kernel<function>::call).
template <auto function>
struct Kernel;
template <typename Result, typename... Args, Result (*function)(Args...)>
struct Kernel<function> {
  static Result call(Args... args) {
    try {
      return function(std::move(args)...);
    } catch (const Error& error) {
      switch (error.status()) {
        case BLASST_INVALID_ARGUMENT:
          raise("ValueError", std::string_view(error.what()));
        case BLASST_UNSUPPORTED:
          raise("NotImplementedError", std::string_view(error.what()));
        case BLASST_OUT_OF_MEMORY:
          raise("MemoryError", std::string_view(error.what()));
        default:
          throw;
      }
    } catch (const std::bad_alloc&) {
      raise("MemoryError", std::string_view("out of memory"));
    }
  }
};

void check_shape(std::string_view name, const Tensor& t, std::string_view meaning,
                 const std::vector<int64_t>& shape);

void check_type(std::string_view name, const Tensor& t, ScalarType type);

// The tensors that are given must be where `first` is.
void check_devices(std::string_view first_name, const Tensor& first,
                   std::initializer_list<std::pair<std::string_view, const Tensor*>> others);

inline const Tensor* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }

DType dtype_of(std::string_view name, const Tensor& t);

// Of keys and values, which may be in 8 bits.
DType cache_dtype_of(std::string_view name, const Tensor& t);

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
Tensor readable(const Tensor& t);

// The same for the GPU, which reads whole 16 bytes: for what torch lays out, not the caller.
Tensor aligned(const Tensor& t);

// [request, token, head, element] of a 4-d tensor, [token, head, element] of a 3-d one. The last
// dimension must be contiguous; a dimension of one element may have any stride.
View view_of(const Tensor& t);

// An array of float32 of the given shape, or null. `t` becomes contiguous, to live as long as the
// caller's.
const float* floats(std::string_view name, OptionalTensor& t, std::string_view meaning,
                    const std::vector<int64_t>& shape);

// An index tensor of the given shape as contiguous int32, or null. `t` is replaced by it, to live
// as long as the caller's.
const int32_t* indices(std::string_view name, OptionalTensor& t, std::string_view meaning,
                       const std::vector<int64_t>& shape);

inline std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// Contiguous.
inline Tensor new_like(const Tensor& t) { return torch::stable::new_empty(t, shape_of(t)); }

}  // namespace blasst::binding
