// Scales of keys and values in 8 bits, in double precision.
#pragma once

#include <cstdint>

#include "problem/problem.h"

namespace blasst::reference {

inline double scale_of(const Scales& scales, int64_t request, int64_t kv_head) {
  if (!scales.values) return 1;
  return scales.values[request * scales.stride_request + kv_head * scales.stride_head];
}

// What q.k is multiplied by.
inline double score_scale_of(const problem::Problem& p, int64_t request, int64_t kv_head) {
  return static_cast<double>(p.scale) * scale_of(p.k_scales, request, kv_head);
}

}  // namespace blasst::reference
