#include "api/choose.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/backend.h"
#include "problem/text.h"
#if BLASST_CUDA
#include "cuda/backend.h"
#endif

namespace blasst::api {
namespace {

constexpr const char* kNames[] = {"auto", "cpu", "cuda", "cuda-sm90", "cuda-sm80"};

std::string name_of(blasst_backend backend) {
  return formatted("{} ({})", kNames[backend], static_cast<int>(backend));
}

bool is_for_gpus(blasst_backend backend) {
  return backend == BLASST_BACKEND_CUDA_SM90 || backend == BLASST_BACKEND_CUDA_SM80;
}

// Whether a caller who wants `wanted` means this one.
bool is_meant(blasst_backend wanted, blasst_backend backend) {
  if (wanted == backend) return true;
  if (wanted != BLASST_BACKEND_AUTO && wanted != BLASST_BACKEND_CUDA) return false;
  if (!is_for_gpus(backend)) return wanted == BLASST_BACKEND_AUTO;
  static const blasst_backend by_environment =
      cuda_backend_named(std::getenv("BLASST_CUDA_BACKEND"));
  return by_environment == BLASST_BACKEND_CUDA || by_environment == backend;
}

// Of those for GPUs, the ones that run on this machine's; all, where none does: one that is named
// says itself what is in its way, and plans without a device, too.
void keep_runnable(std::vector<const Backend*>& asked) {
  const auto runs = [](const Backend* backend) {
    return backend->obstacle({.host = false, .gpu = true}).empty();
  };
  if (std::ranges::any_of(asked, runs)) std::erase_if(asked, std::not_fn(runs));
}

}  // namespace

blasst_backend cuda_backend_named(const char* name) {
  if (!name || !*name) return BLASST_BACKEND_CUDA;
  for (const blasst_backend backend : {BLASST_BACKEND_CUDA_SM90, BLASST_BACKEND_CUDA_SM80})
    if (std::string_view(name) == kNames[backend]) return backend;
  throw Error(BLASST_UNSUPPORTED,
              formatted("BLASST_CUDA_BACKEND is '{}'; it must be {} or {}", name,
                        kNames[BLASST_BACKEND_CUDA_SM90], kNames[BLASST_BACKEND_CUDA_SM80]));
}

std::span<const Backend* const> backends() {
  static const std::vector<const Backend*> all {
#if BLASST_CUDA
    &cuda::sm90_backend(), &cuda::sm80_backend(),
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
  std::ranges::copy_if(candidates, std::back_inserter(asked),
                       [&](const Backend* backend) { return is_meant(wanted, backend->id()); });
  if (asked.empty()) {
    std::string built;
    for (const Backend* backend : candidates)
      built += (built.empty() ? "" : ", ") + name_of(backend->id());
    throw Error(BLASST_UNSUPPORTED,
                formatted("backend {} is not in this build; it has: {}", name_of(wanted), built));
  }
  if (wanted == BLASST_BACKEND_CUDA) keep_runnable(asked);
  std::vector<std::string> reasons;  // each once: backends share checks
  for (const Backend* backend : asked) {
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
    if (std::ranges::find(reasons, why) == reasons.end()) reasons.push_back(why);
  }
  throw Error(BLASST_UNSUPPORTED,
              (reasons.size() == 1 ? "" : "no backend takes this call: ") + join(reasons, "; "));
}

}  // namespace blasst::api
