// The CPU backend.
#pragma once

#include "api/backend.h"

namespace blasst::cpu {

const api::Backend& backend();

// Views as check_merge leaves them, of one type.
void merge(const MergeParams& params, int threads);

}  // namespace blasst::cpu
