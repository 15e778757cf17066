// The check of page tables and lengths on the device. No CUDA types here.
#pragma once

#include <cstdint>

#include "blasst/blasst.hpp"

namespace blasst::cuda {

struct PageCheck {
  const int32_t* table;    // [batch, stride]
  const int32_t* lengths;  // [batch]
  int64_t batch, stride, page_size, pages;
  int64_t room;    // the most keys of a request
  int32_t* found;  // [4]
  void* stream;
};

// From parameters; throws Error. Plain host code.
PageCheck plan_page_check(const blasst_problem& problem, int32_t* found, void* stream);

void launch_page_check(const PageCheck& check);

}  // namespace blasst::cuda
