// Where a request's query rows are.
#pragma once

#include "cuda/core/keys.cuh"
#include "cuda/core/prefill/params.h"

namespace blasst::cuda::prefill {

// Whether some rows are padding, which rows_of_request leaves out.
__host__ __device__ __forceinline__ bool may_be_padded(const Params& p) {
  return p.keys.starts || p.query_lengths;
}

// Rows in use, among those of all requests. In a padded batch where no row looks ahead a row before
// every key is padding, too: a request then has the query tiles that it has alone.
__device__ __forceinline__ Span rows_of_request(const Params& p, int request, int keys) {
  if (p.cu_seqlens_q) {
    const int first = p.cu_seqlens_q[request];
    return {first, max(0, p.cu_seqlens_q[request + 1] - first)};
  }
  const int first = request * p.query_length;
  int used = p.query_length;
  if (p.query_lengths) used = max(0, min(p.query_lengths[request], used));
  const int count = may_be_padded(p) && p.distances.least >= 0 ? min(used, keys) : used;
  return {first + used - count, count};
}

// Of a row among those of all requests: its token in q and out.
__device__ __forceinline__ int row_in_tensor(const Params& p, int request, int row) {
  return p.cu_seqlens_q ? row : row - request * p.query_length;
}

}  // namespace blasst::cuda::prefill
