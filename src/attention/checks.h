// Checks of parameters that read no array, so that they hold for arrays on any device, too.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string_view>
#include <utility>

#include "blasst/blasst.hpp"

namespace blasst::attention {

constexpr int64_t kMaxCount =
    std::numeric_limits<int32_t>::max();            // tokens, heads, requests, pages
constexpr int64_t kMaxElements = int64_t{1} << 47;  // a tensor; keeps byte offsets in int64
constexpr int64_t kMaxThreads = 4096;

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(BLASST_INVALID_ARGUMENT, fmt::format(format, std::forward<Args>(args)...));
}

// The largest stride with which `count` steps stay below an offset of kMaxElements.
constexpr int64_t most_stride(int64_t count) { return kMaxElements / std::max<int64_t>(1, count); }

void check_range(std::string_view name, int64_t value, int64_t least, int64_t most);

// Sizes, scalars and options of a call. Throws Error, as does everything here.
void check_scalars(const PrefillParams& params);
void check_scalars(const DecodeParams& params);

// The view's last element, [outer - 1, tokens - 1, heads - 1, dim - 1], lies inside its buffer.
void check_view(std::string_view name, const View& view, DType dtype, int64_t outer, int64_t tokens,
                int64_t heads, int64_t dim);

// No two elements of the view share an address.
void check_no_overlap(std::string_view name, const View& view, int64_t outer, int64_t tokens,
                      int64_t heads, int64_t dim);

void check_not_shared(std::string_view out_name, const View& out, std::string_view name,
                      const View& input, DType dtype);

// Everything about a merge.
void check_merge(const MergeParams& params);

}  // namespace blasst::attention
