// The ordered list of backends, and the choice among them.
#pragma once

#include <functional>
#include <span>

#include "api/backend.h"

namespace blasst::api {

// Those of this build, in the order in which they are asked.
std::span<const Backend* const> backends();

// The backend for NVIDIA GPUs that the environment's BLASST_CUDA_BACKEND names, by its text: a
// backend's name; null or empty: any, BLASST_BACKEND_CUDA. Throws Error.
blasst_backend cuda_backend_named(const char* name);

// Where this pointer's memory is; null counts as the host's.
Memory memory_of(const void* data);

// Calls ask(backend), unless the environment rules it out, for the candidates that are the one
// wanted, or, if that is AUTO, for those that can work in `memory`, until one takes the call: does
// not throw BLASST_UNSUPPORTED. If none does, an Error with every one's reason.
void choose(std::span<const Backend* const> candidates, blasst_backend wanted, Memory memory,
            const std::function<void(const Backend&)>& ask);

}  // namespace blasst::api
