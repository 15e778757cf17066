// A decode call that was planned, and what launching it takes on every architecture. No CUDA types,
// so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/decode/params.h"
#include "cuda/core/tensor.h"

namespace blasst::cuda::decode {

struct Launch {
  Params params;
  Tensor q, k, v;
  Element element;  // of queries
  Cache cache;
  int qk_dim, value_dim;  // of queries and keys, of values and outputs
  void* workspace;
  std::size_t workspace_bytes;  // at least what place_results() says
  void* stream;                 // a cudaStream_t
};

// How the keys of a request are cut.
struct SplitRule {
  int least_tiles;  // a split has at least so many
  int most;         // splits of a request and KV head
};

// The part of the plan that the shapes decide. kv_heads: those, or the parts of them in which query
// heads decide. Throws Error.
Plan plan_splits(int batch, int kv_heads, int key_length, int rows, SplitRule rule,
                 bool whole_groups);

// Places the plan's arrays in the workspace, 256-byte aligned; returns the end of the last.
std::size_t place_results(Plan& plan, int value_dim, void* workspace);

// The same in the workspace of a launch. Throws Error where that is too small.
void place_results(Plan& plan, const Launch& launch);

// Of a launch (Turns): none has had it, and it is neither 0 nor all ones. Thread-safe.
std::uint64_t new_signature();

// How the work is dealt out: to `blocks` blocks, which the GPU runs at a time, in items of at most
// `most_item_tiles` tiles (and what joins the last split), one split, or one group. Returns how
// many blocks there is work for.
int deal_out(Plan& plan, int blocks, int most_item_tiles);

Variant variant_of(const Params& params);

// What no item writes.
void clear_report(const Params& params, void* stream);

// Of a call without queries.
void report_nothing(const Params& params, void* stream);

// Enqueues the kernel that adds the plan's results. early: it is set up while the kernel before it
// runs, and waits for that one's results.
void enqueue_combine(const void* kernel, const Params& params, const Plan& plan, int value_dim,
                     bool early, void* stream);

}  // namespace blasst::cuda::decode
