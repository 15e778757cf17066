// blasst info: what was built, and what of it this machine can use.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "api/choose.h"
#include "blasst/blasst.hpp"
#include "commands.h"
#include "problem/text.h"

namespace blasst::command {
namespace {

// Which backends take the calls whose tensors are on the GPU, and why.
std::string picked() {
  const char* named = std::getenv("BLASST_CUDA_BACKEND");
  std::string names;
  for (const BackendInfo& backend : backends()) {
    if (backend.backend == BLASST_BACKEND_CPU || !backend.usable) continue;
    if (named && *named && backend.name != named) continue;
    names += (names.empty() ? "" : ", then, for what that does not do, ") + backend.name;
  }
  if (names.empty()) return "";
  return formatted("  calls on the GPU go to {} ({})\n", names,
                   named && *named ? "BLASST_CUDA_BACKEND names it" : "the first that runs here");
}

int info() {
  // First: the environment may name what is not there.
  const std::string in_use = cpu_isa();
  api::cuda_backend_named(std::getenv("BLASST_CUDA_BACKEND"));
  print(stdout, "blasst {}\n\nbackends\n", version());
  for (const BackendInfo& backend : backends())
    print(stdout, "  {:<9}  {:<12} {} ({})\n", backend.name, backend.architecture,
          backend.usable ? "usable" : "not usable here", backend.detail);
  print(stdout, "{}", picked());
  print(stdout, "\ncpu instruction sets, best first\n");
  for (const std::string& isa : cpu_isas())
    print(stdout, "  {}{}\n", isa, isa == in_use ? "  in use" : "");
  print(stdout, "\nthreads      {}\n", default_threads());
  return 0;
}

}  // namespace

Run add_info(CLI::App&) { return info; }

}  // namespace blasst::command
