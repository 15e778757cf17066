// From parameters to a launch. Plain host code: no GPU is needed to call it.
#pragma once

#include "blasst/blasst.hpp"
#include "cuda/core/decode/launch.h"

namespace blasst::cuda::decode::sm80 {

// What the call decides on and needs. Reads scalars only, and says what this backend does not do.
// Throws Error.
blasst_plan plan(const AttentionParams& params);

// Checks everything that the host can see. Throws Error.
Launch plan_launch(const AttentionParams& params);

}  // namespace blasst::cuda::decode::sm80
