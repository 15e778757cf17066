// The backends for NVIDIA GPUs. No CUDA types here.
#pragma once

#include <cstdint>

#include "api/backend.h"
#include "blasst/blasst.hpp"

namespace blasst::cuda {

const api::Backend& sm90_backend();  // compute capability 9.0
const api::Backend& sm80_backend();  // 8.0 and later

// Where a pointer's memory is.
api::Memory memory_of(const void* data);

void check_pages(const blasst_problem& problem, int32_t* found, void* stream);

}  // namespace blasst::cuda
