// What a set of kernels, compiled for one instruction set, provides.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu/backward/plan.h"
#include "cpu/int8/keys.h"
#include "cpu/plan.h"
#include "cpu/totals.h"
#include "problem/problem.h"

namespace blasst::cpu {

// Row operations in float32; counts and dimensions are multiples of 8.
struct ChunkKernels {
  // Stored elements to floats.
  void (*widen)(const std::byte* row, int64_t count, float* to);
  void (*add)(const float* row, int64_t count, float* sum);
  // out[i] = q . rows[i], rows `stride` floats apart.
  void (*dots)(const float* q, const float* rows, int64_t stride, int64_t count, int64_t dim,
               float* out);
  // y [rows, outputs] = x [rows, inputs] weight [inputs, outputs] + bias (null: 0); outputs: a
  // multiple of 32.
  void (*affine)(const float* x, int64_t rows, int64_t inputs, const float* weight,
                 const float* bias, int64_t outputs, float* y);
};

// Scores in int8, in this order: the mean key of a request and KV head; each of its key tiles;
// prefill as below. `scratch`: prefill_scratch_floats, 64-byte aligned.
struct Int8Kernels {
  void (*mean)(const Problem& p, const Int8Keys& keys, int64_t request, int64_t kv_head);
  void (*quantize)(const Problem& p, const Int8Keys& keys, int64_t request, int64_t kv_head,
                   int64_t tile, float* scratch);
  void (*prefill)(const Problem& p, const Int8Keys& keys, const PrefillUnit& unit, Totals& totals,
                  float* scratch);
};

struct Kernels {
  // Visit the unit's key tiles and write its output rows. `scratch`: prefill_scratch_floats,
  // 64-byte aligned.
  void (*prefill)(const Problem& p, const PrefillUnit& unit, Totals& totals, float* scratch);
  // Of the split that begins a visit: leaves in every split's partial result what its tiles are
  // tested against. `scratch`:
  // decode_scratch_floats, 64-byte aligned.
  void (*decode_seeds)(const Problem& p, const DecodeUnit& unit, Totals& totals, float* scratch,
                       const Partial* partials);
  // Visit one split; leaves a partial result of each of its query tiles. `scratch`:
  // decode_scratch_floats for each query tile, 64-byte aligned.
  void (*decode)(const Problem& p, const DecodeUnit& unit, Totals& totals, float* scratch,
                 const Partial* partials);
  // Join a query tile's splits, in their order, and write its output rows.
  void (*combine)(const Problem& p, const QueryTile& tile, const Partial* splits, int64_t count);

  // Backward, in this order: delta and lse_rest of the tile's rows; a unit's dk, dv and part of dq;
  // the tile's dq from the parts. `scratch`: backward_scratch_floats, 64-byte aligned.
  void (*backward_rows)(const BackwardPlan& plan, const BackwardTile& tile, float* scratch);
  void (*backward)(const BackwardPlan& plan, const BackwardUnit& unit, float* scratch);
  void (*backward_finish)(const BackwardPlan& plan, const QueryTile& tile);

  ChunkKernels chunks;
  Int8Kernels int8;
};

// One per storage type, in the order of blasst_dtype.
using KernelTable = std::array<Kernels, 3>;

}  // namespace blasst::cpu
