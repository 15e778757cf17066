// Where a request's rows and keys are.
#pragma once

#include "cuda/sm90/prefill/params.h"

namespace blasst::cuda::prefill {

struct Span {
  int first, count;
};

// Keys in use. Ragged: among all keys; else among those that the request has room for.
__device__ __forceinline__ Span keys_of_request(const Params& p, int request) {
  if (p.cu_seqlens_k) {
    const int first = p.cu_seqlens_k[request];
    return {first, max(0, min(p.cu_seqlens_k[request + 1] - first, p.key_length))};
  }
  const int first = p.starts ? max(0, p.starts[request]) : 0;
  const int end = p.lengths ? min(p.lengths[request], p.key_length) : p.key_length;
  return {first, max(0, end - first)};
}

// Whether some rows are padding, which rows_of_request leaves out.
__host__ __device__ __forceinline__ bool may_be_padded(const Params& p) {
  return p.starts || p.query_lengths;
}

// Rows in use, among those of all requests. In a padded batch a causal row before every key is
// padding, too: a request then has the query tiles that it has alone.
__device__ __forceinline__ Span rows_of_request(const Params& p, int request, int keys) {
  if (p.cu_seqlens_q) {
    const int first = p.cu_seqlens_q[request];
    return {first, max(0, p.cu_seqlens_q[request + 1] - first)};
  }
  const int first = request * p.query_length;
  int used = p.query_length;
  if (p.query_lengths) used = max(0, min(p.query_lengths[request], used));
  const int count = may_be_padded(p) && p.least_distance >= 0 ? min(used, keys) : used;
  return {first + used - count, count};
}

// Of a row among those of all requests: its token in q and out.
__device__ __forceinline__ int row_in_tensor(const Params& p, int request, int row) {
  return p.cu_seqlens_q ? row : row - request * p.query_length;
}

}  // namespace blasst::cuda::prefill
