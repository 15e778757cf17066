#include "problem/text.h"

#include <fmt/format.h>

namespace blasst {

std::string format_text(fmt::string_view format, fmt::format_args args) {
  return fmt::vformat(format, args);
}

std::string join(std::span<const std::string> parts, std::string_view separator) {
  std::string joined;
  for (const std::string& part : parts) {
    if (&part != parts.data()) joined += separator;
    joined += part;
  }
  return joined;
}

}  // namespace blasst
