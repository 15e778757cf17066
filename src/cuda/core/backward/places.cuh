// Where the query tiles of a request stand among those of all requests.
#pragma once

#include "cuda/core/backward/params.h"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/tiles.h"

namespace blasst::cuda::backward {

__device__ __forceinline__ int first_query_tile(const prefill::Params& p, int request) {
  return p.cu_seqlens_q ? p.first_query_tile[request]
                        : request * ceil_div(p.query_length, kQueryTileRows);
}

// A request's rows and keys.
struct RequestSpans {
  Span keys;   // in use, in the tensor
  Span rows;   // among those of all requests
  int offset;  // position of row 0
};

__device__ __forceinline__ RequestSpans spans_of(const prefill::Params& p, int request) {
  const Span keys = keys_of_request(p.keys, request);
  const Span rows = prefill::rows_of_request(p, request, keys.count);
  return {keys, rows, keys.count - rows.count};
}

}  // namespace blasst::cuda::backward
