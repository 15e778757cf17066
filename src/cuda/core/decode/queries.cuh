// Where a request's queries are.
#pragma once

#include "cuda/core/decode/params.h"
#include "cuda/core/keys.cuh"

namespace blasst::cuda::decode {

// Its rows, among those of all requests.
__device__ __forceinline__ Span rows_of_request(const Params& p, int request) {
  if (!p.cu_seqlens_q) return {request * p.query_length, p.query_length};
  const int first = p.cu_seqlens_q[request];
  return {first, max(0, min(p.cu_seqlens_q[request + 1] - first, p.query_length))};
}

// Where the first of them is in q and out.
__device__ __forceinline__ TokenPlace first_query(const Params& p, int request) {
  if (p.cu_seqlens_q) return {p.cu_seqlens_q[request], 0};
  return {0, request};
}

}  // namespace blasst::cuda::decode
