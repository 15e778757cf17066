// Checks that the kernels for GPUs share. No CUDA types here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <tuple>
#include <utility>

#include "blasst/blasst.hpp"
#include "problem/checks.h"
#include "problem/element.h"
#include "problem/text.h"

namespace blasst::cuda {

// The backends' names, as errors begin with them.
inline constexpr std::string_view kCuda = "cuda", kCudaSm90 = "cuda-sm90", kCudaSm80 = "cuda-sm80";

// What is valid but not done by this backend.
template <typename... Args>
[[noreturn]] void refuse(std::string_view backend, fmt::format_string<Args...> format,
                         const Args&... args) {
  throw Error(BLASST_UNSUPPORTED, formatted("{}: {}", backend, formatted(format, args...)));
}

// The copy engine's rules: addresses and strides of whole 16 bytes.
inline void check_aligned(std::string_view backend, std::string_view name, const View& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0)
    refuse(backend, "{}.data is {}; it must be 16-byte aligned", name, view.data);
  for (const auto& [stride_name, stride] :
       {std::pair{"stride_request", view.stride_request},
        std::pair{"stride_token", view.stride_token}, std::pair{"stride_head", view.stride_head}}) {
    if (stride >= int64_t{1} << 39)
      refuse(backend, "{}.{} is {}; it must be less than 2^39 elements, 1 TiB", name, stride_name,
             stride);
    const int64_t unit = 16 / problem::element_bytes(view.dtype);
    if (stride % unit != 0)
      refuse(backend, "{}.{} is {}; it must be a multiple of {} elements, 16 bytes", name,
             stride_name, stride, unit);
  }
}

inline void check_page_size(std::string_view backend, const KeysValues& kv) {
  if (kv.page_size < 16 || (kv.page_size & (kv.page_size - 1)) != 0)
    refuse(backend, "kv.page_size is {}; it does 16, 32, 64, 128 and 256", kv.page_size);
}

// Views of the keys and values.
inline void check_key_views(std::string_view backend, const blasst_problem& p) {
  const auto [outer, tokens] = problem::key_tensor(p);
  if (problem::most_keys(p) == 0 || outer == 0) return;
  for (const auto& [name, view, dim] :
       {std::tuple{"k", &p.kv.k, p.head_dim}, std::tuple{"v", &p.kv.v, p.value_dim}}) {
    problem::check_view(name, *view, outer, tokens, p.kv_heads, dim);
    check_aligned(backend, name, *view);
  }
}

}  // namespace blasst::cuda
