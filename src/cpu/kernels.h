// What a set of kernels, compiled for one instruction set, provides.
#pragma once

#include <array>
#include <cstdint>

#include "attention/problem.h"
#include "cpu/backward_plan.h"
#include "cpu/plan.h"
#include "cpu/totals.h"

namespace blasst::cpu {

struct Kernels {
  // Visit the unit's key tiles and write its output rows. `scratch`: prefill_scratch_floats,
  // 64-byte aligned.
  void (*prefill)(const Problem& p, const PrefillUnit& unit, Totals& totals, float* scratch);
  // Visit one split; leaves a partial result of each of its query tiles. `scratch`:
  // decode_scratch_floats for each query tile, 64-byte aligned.
  void (*decode)(const Problem& p, const DecodeUnit& unit, Totals& totals, float* scratch,
                 const Partial* partials);
  // Join a query tile's splits, in their order, and write its output rows.
  void (*combine)(const Problem& p, const QueryTile& tile, const Partial* splits, int64_t count);

  // Backward, in this order: delta of the tile's rows; a unit's dk, dv and part of dq (`scratch`:
  // backward_scratch_floats, 64-byte aligned); the tile's dq from the parts.
  void (*backward_delta)(const BackwardPlan& plan, const QueryTile& tile);
  void (*backward)(const BackwardPlan& plan, const BackwardUnit& unit, float* scratch);
  void (*backward_finish)(const BackwardPlan& plan, const QueryTile& tile);
};

// One per storage type, in the order of blasst_dtype.
using KernelTable = std::array<Kernels, 3>;

}  // namespace blasst::cpu
