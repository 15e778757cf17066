// From checked parameters to a launch. Plain host code: no GPU is needed to call it.
#pragma once

#include <cstddef>

#include "blasst/blasst.hpp"
#include "cuda/sm90/decode/launch.h"

namespace blasst::cuda::decode {

// Checks everything that the host can see, and says what this backend does not do. Throws Error.
Launch plan(const DecodeParams& params);

// The same checks without the workspace.
std::size_t workspace_bytes(const DecodeParams& params);
TileShape tile_shape(const DecodeParams& params);

}  // namespace blasst::cuda::decode
