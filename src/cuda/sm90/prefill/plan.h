// From checked parameters to a launch. Plain host code: no GPU is needed to call it.
#pragma once

#include <cstddef>

#include "blasst/blasst.hpp"
#include "cuda/sm90/prefill/launch.h"

namespace blasst::cuda::prefill {

// Checks everything that the host can see, and says what this backend does not do. Throws Error.
Launch plan(const PrefillParams& params);

// The same checks without the workspace.
std::size_t workspace_bytes(const PrefillParams& params);
TileShape tile_shape(const PrefillParams& params);

}  // namespace blasst::cuda::prefill
