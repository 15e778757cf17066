// Where the query tiles of a request stand among those of all requests.
#pragma once

#include "cuda/core/backward/params.h"
#include "cuda/core/prefill/key_tiles.cuh"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/tiles.h"

namespace blasst::cuda::backward {

__device__ __forceinline__ int first_query_tile(const prefill::Params& p, int request) {
  return p.cu_seqlens_q ? p.first_query_tile[request]
                        : request * ceil_div(p.query_length, kQueryTileRows);
}

// Whether the first key tile of a request of such keys is cut into parts.
__device__ __forceinline__ bool has_parts(const Params& b, Span keys, int tile_keys) {
  return b.sum_slots > 0 && keys.count > kShortKeyTiles * tile_keys;
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

// Where the gradient of a key of the tensor is.
template <typename T>
__device__ __forceinline__ T* key_row(const OutputRows& rows, const prefill::Params& p, int request,
                                      int kv_head, int key) {
  return static_cast<T*>(rows.data) + (p.keys.cu_seqlens ? 0 : request * rows.stride_request) +
         key * rows.stride_token + kv_head * rows.stride_head;
}

// The request whose first key tile's parts have a slot of Params::sums; -1: none. Dense requests
// have a slot each; the first tiles of long ragged ones are more than kShortKeyTiles apart.
__device__ __forceinline__ int request_of_slot(const Params& b, int slot, int tile_keys) {
  const prefill::Params& p = b.forward;
  int request = slot;
  if (p.keys.cu_seqlens) {
    const prefill::KeyTile at = prefill::key_tile_at(
        p.keys, p.batch, slot * kShortKeyTiles + kShortKeyTiles - 1, tile_keys);
    if (at.tile >= kShortKeyTiles) return -1;
    request = at.request;
  }
  return has_parts(b, keys_of_request(p.keys, request), tile_keys) ? request : -1;
}

}  // namespace blasst::cuda::backward
