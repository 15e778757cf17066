// Kernels beside the products of backward. No CUDA types here.
#pragma once

#include "cuda/core/backward/params.h"
#include "cuda/core/tensor.h"

namespace blasst::cuda::backward {

// The rows' LSE and delta (params.rows).
void measure_rows(const Params& params, Element element, int value_dim, void* stream);

// Which query tiles kept each key tile (params.keepers), from the tile bits.
void list_keepers(const Params& params, int tile_keys, void* stream);

// dk and dv of the key tiles that are cut into parts, from params.sums, always in the same order.
void add_parts(const Params& params, Element element, int tile_keys, int qk_dim, int value_dim,
               void* stream);

// params.dsinks, from the measured rows; always summed in the same order.
void add_sinks(const Params& params, void* stream);

// Gradients of rows that are padding, and of keys that are no request's: zero.
void clear_unused(const Params& params, int64_t key_outer, int64_t key_tokens, int qk_dim,
                  int value_dim, void* stream);

}  // namespace blasst::cuda::backward
