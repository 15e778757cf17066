// The ordered list of backends, and the choice among them.
#pragma once

#include <functional>
#include <span>

#include "api/backend.h"

namespace blasst::api {

// Those of this build, in the order in which they are asked.
std::span<const Backend* const> backends();

// Where this pointer's memory is; null counts as the host's.
Memory memory_of(const void* data);

// Calls ask(backend) for the candidates that are the one wanted, or, if that is AUTO, for those
// that can work in `memory`, until one takes the call: does not throw BLASST_UNSUPPORTED. If none
// does, an Error with every one's reason.
void choose(std::span<const Backend* const> candidates, blasst_backend wanted, Memory memory,
            const std::function<void(const Backend&)>& ask);

}  // namespace blasst::api
