// Kernels that find, and clear, what the requests of a batch have. No CUDA types here.
#pragma once

#include "cuda/core/prefill/params.h"

namespace blasst::cuda::prefill {

// Clears counters, and what no item writes.
void clear_report(const Params& params, void* stream);

// Where the blocks of each request begin, and the query tiles of a ragged batch (first_block,
// first_query_tile); no item is taken yet (next_item). block_rows: of an item.
void list_blocks(const Params& params, int block_rows, void* stream);

// Rows that are padding: their output is 0. Their LSE is that of a row without a key, or -inf where
// a row is not in use.
void clear_padding(const Params& params, int value_dim, void* stream);

}  // namespace blasst::cuda::prefill
