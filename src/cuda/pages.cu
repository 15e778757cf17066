#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/core/runtime.h"
#include "cuda/pages.h"

namespace blasst::cuda {
namespace {

constexpr int kThreads = 1024;

// One block, so that the first fault is the same in every run. Place i of a request is its length
// (0) or page i - 1 of its table.
__global__ void __launch_bounds__(kThreads) find_fault(const __grid_constant__ PageCheck c) {
  __shared__ unsigned long long first;  // request * places + place
  if (threadIdx.x == 0) first = ~0ull;
  __syncthreads();
  const int64_t places = c.stride + 1;
  for (int64_t i = threadIdx.x; i < c.batch * places; i += kThreads) {
    const int64_t request = i / places, page = i % places - 1;
    const int64_t length = c.lengths[request];
    bool bad = length < 0 || length > c.room;
    if (page >= 0) {
      if (page * c.page_size >= min(length, c.room)) continue;
      const int id = c.table[request * c.stride + page];
      bad = id < 0 || id >= c.pages;
    }
    if (bad) {
      atomicMin(&first, static_cast<unsigned long long>(i));
      break;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int found[4] = {BLASST_PAGES_GOOD, 0, 0, 0};
  if (first != ~0ull) {
    const auto at = static_cast<int64_t>(first);
    const int request = static_cast<int>(at / places), page = static_cast<int>(at % places) - 1;
    found[0] = page < 0 ? BLASST_PAGE_LENGTH : BLASST_PAGE_ID;
    found[1] = request;
    found[2] = page < 0 ? c.lengths[request] : page;
    found[3] = page < 0 ? static_cast<int>(c.room) : c.table[request * c.stride + page];
  }
  for (int i = 0; i < 4; ++i) c.found[i] = found[i];
}

}  // namespace

void launch_page_check(const PageCheck& c) {
  enqueue(find_fault, 1, kThreads, static_cast<cudaStream_t>(c.stream), c);
}

}  // namespace blasst::cuda
