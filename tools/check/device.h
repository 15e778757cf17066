// The same problems on a GPU, through the library's interface.
#pragma once

#include "check/problem.h"

namespace blasst::check {

// A problem like `c` that cuda-sm90 takes: its types, dimensions, pages, strides, query rows.
Case for_gpu(Case c);

// Parameters of the problem as the GPU is called with: backend and limits, host pointers still.
PrefillParams gpu_params(const Problem& problem);

// Fills the outputs with marks, copies everything to the current device, calls the library
// `repeats` times, and copies the outputs back. Throws Error.
void run_on_gpu(Problem& problem, int repeats = 1);

}  // namespace blasst::check
