// From parameters to a launch. Plain host code: no GPU is needed to call it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blasst/blasst.hpp"
#include "cuda/sm90/backward/launch.h"

namespace blasst::cuda::backward {

// Where in the workspace things are, in bytes.
struct WorkspaceLayout {
  std::size_t rows, keepers, sums, bytes;  // lists of blocks are at its beginning
};

// What the call takes over and needs. Reads scalars only, and says what this backend does not do.
// Throws Error.
Plan plan(const BackwardParams& params);

// Checks everything that the host can see. Throws Error.
Launch plan_launch(const BackwardParams& params);

}  // namespace blasst::cuda::backward
