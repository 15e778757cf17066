// Where the tiles of a request's keys stand among those of all requests.
#pragma once

#include "cuda/core/keys.cuh"
#include "cuda/core/prefill/params.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::prefill {

// Ragged requests share tiles of tokens with nobody: each may begin one more.
__device__ __forceinline__ int first_key_tile(const KeyLayout& keys, int request, int tile_keys) {
  return keys.cu_seqlens ? keys.cu_seqlens[request] / tile_keys + request
                         : request * ceil_div(keys.length, tile_keys);
}

struct KeyTile {
  int request, tile;  // tile: of the request; it may lie behind its keys
};

// The tile at a place among those of all requests.
__device__ __forceinline__ KeyTile key_tile_at(const KeyLayout& keys, int batch, int place,
                                               int tile_keys) {
  if (!keys.cu_seqlens) {
    const int each = ceil_div(keys.length, tile_keys);
    return {place / each, place % each};
  }
  int low = 0, high = batch - 1;  // the last request that begins at or before the place
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    first_key_tile(keys, middle, tile_keys) <= place ? low = middle : high = middle - 1;
  }
  return {low, place - first_key_tile(keys, low, tile_keys)};
}

}  // namespace blasst::cuda::prefill
