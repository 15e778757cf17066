// Launching the merge kernel. No CUDA types here.
#pragma once

#include "blasst/blasst.hpp"

namespace blasst::cuda {

// Parameters that were checked, with aligned views of float16 or bfloat16. Throws Error.
void launch_merge(const MergeParams& params);

}  // namespace blasst::cuda
