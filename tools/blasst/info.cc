// blasst info: what was built, and what of it this machine can use.
#include <fmt/format.h>

#include "commands.h"

namespace blasst::command {
namespace {

int info() {
  const std::string in_use = cpu_isa();  // first: the environment may name one that is not there
  fmt::print("blasst {}\n\nbackends\n", version());
  for (const BackendInfo& backend : backends())
    fmt::print("  {:<6} {:<12} {} ({})\n", backend.name, backend.architecture,
               backend.usable ? "usable" : "not usable here", backend.detail);
  fmt::print("\ncpu instruction sets, best first\n");
  for (const std::string& isa : cpu_isas())
    fmt::print("  {}{}\n", isa, isa == in_use ? "  in use" : "");
  fmt::print("\nthreads      {}\n", default_threads());
  return 0;
}

}  // namespace

Run add_info(CLI::App&) { return info; }

}  // namespace blasst::command
