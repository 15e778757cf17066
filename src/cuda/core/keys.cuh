// Where a request's keys are.
#pragma once

#include "cuda/core/params.h"

namespace blasst::cuda {

struct Span {
  int first, count;
};

// Keys in use. Ragged: among all keys; else among those that the request has room for.
__device__ __forceinline__ Span keys_of_request(const KeyLayout& keys, int request) {
  if (keys.cu_seqlens) {
    const int first = keys.cu_seqlens[request];
    return {first, max(0, min(keys.cu_seqlens[request + 1] - first, keys.length))};
  }
  const int first = keys.starts ? max(0, keys.starts[request]) : 0;
  const int end = keys.lengths ? min(keys.lengths[request], keys.length) : keys.length;
  return {first, max(0, end - first)};
}

// Where a request's token is in the tensor [outer, tokens, kv_heads, dim].
struct TokenPlace {
  int token, outer;
};

// first: the request's first key. page: of the token, where keys are paged.
__device__ __forceinline__ TokenPlace place_of_token(const KeyLayout& keys, int request, int first,
                                                     int token, int page) {
  if (keys.page_table) return {token % keys.page_size, page};
  return {first + token, keys.cu_seqlens ? 0 : request};
}

}  // namespace blasst::cuda
