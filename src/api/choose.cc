#include "api/choose.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "cpu/backend.h"
#if BLASST_CUDA
#include "cuda/backend.h"
#endif

namespace blasst::api {
namespace {

std::string name_of(blasst_backend backend) {
  constexpr const char* names[] = {"auto", "cpu", "cuda"};
  return fmt::format("{} ({})", names[backend], static_cast<int>(backend));
}

}  // namespace

std::span<const Backend* const> backends() {
  static const std::vector<const Backend*> all {
#if BLASST_CUDA
    &cuda::backend(),
#endif
        &cpu::backend(),
  };
  return all;
}

Memory memory_of([[maybe_unused]] const void* data) {
#if BLASST_CUDA
  return cuda::memory_of(data);
#else
  return {};
#endif
}

void choose(std::span<const Backend* const> candidates, blasst_backend wanted, Memory memory,
            const std::function<void(const Backend&)>& ask) {
  std::vector<const Backend*> asked;
  std::ranges::copy_if(candidates, std::back_inserter(asked), [&](const Backend* backend) {
    return wanted == BLASST_BACKEND_AUTO || backend->id() == wanted;
  });
  if (asked.empty()) {
    std::string built;
    for (const Backend* backend : candidates)
      built += (built.empty() ? "" : ", ") + name_of(backend->id());
    throw Error(BLASST_UNSUPPORTED,
                fmt::format("backend {} is not in this build; it has: {}", name_of(wanted), built));
  }
  std::string reasons;
  for (const Backend* backend : asked) {
    // One that is named says itself what is in its way, and plans without a device, too.
    std::string why = wanted == BLASST_BACKEND_AUTO ? backend->obstacle(memory) : "";
    if (why.empty()) {
      try {
        return ask(*backend);
      } catch (const Error& error) {
        if (error.status() != BLASST_UNSUPPORTED) throw;
        why = error.what();
      }
    } else {
      why.insert(0, backend->info().name + ": ");
    }
    reasons += (reasons.empty() ? "" : "; ") + why;
  }
  throw Error(BLASST_UNSUPPORTED,
              asked.size() == 1 ? reasons : "no backend takes this call: " + reasons);
}

}  // namespace blasst::api
