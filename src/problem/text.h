// Text from a format string and arguments, as fmt has them. fmt's code is compiled in text.cc only:
// in every file it would take most of the compiler's time.
#pragma once

#if __has_include(<fmt/base.h>)
#include <fmt/base.h>  // from fmt 11 on, where core.h is all of it
#else
#include <fmt/core.h>
#endif

#include <cstdio>
#include <span>
#include <string>
#include <string_view>

namespace blasst {

std::string format_text(fmt::string_view format, fmt::format_args args);

// Of a format string: by name from fmt 10 on, before by conversion.
template <typename Format>
fmt::string_view view_of(const Format& format) {
  if constexpr (requires { format.get(); })
    return format.get();
  else
    return format;
}

// fmt::format: a format that does not fit its arguments is an error of the compiler.
template <typename... Args>
std::string formatted(fmt::format_string<Args...> format, const Args&... args) {
  return format_text(view_of(format), fmt::make_format_args(args...));
}

// The text, written to the stream.
template <typename... Args>
void print(std::FILE* stream, fmt::format_string<Args...> format, const Args&... args) {
  std::fputs(format_text(view_of(format), fmt::make_format_args(args...)).c_str(), stream);
}

std::string join(std::span<const std::string> parts, std::string_view separator);

}  // namespace blasst
