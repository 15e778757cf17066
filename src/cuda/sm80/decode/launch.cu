#include <cuda_runtime.h>

#include <string>

#include "blasst/blasst.hpp"
#include "cuda/core/decode/splits.h"
#include "cuda/core/runtime.h"
#include "cuda/sm80/decode/config.cuh"
#include "cuda/sm80/decode/kernels.h"
#include "cuda/sm80/decode/launch.h"
#include "cuda/sm80/decode/shape.h"

namespace blasst::cuda::decode::sm80 {

Plan make_plan(int batch, int kv_heads, int key_length, int rows, int value_dim) {
  const bool adds = folds(value_dim, kernel_rows(rows));
  const int tiles = ceil_div(key_length, kTileKeys);
  Plan plan = plan_splits(batch, kv_heads, key_length, rows,
                          {least_split_tiles(rows), most_splits(kv_heads)},
                          adds && whole_groups(batch, kv_heads, tiles, rows, value_dim));
  plan.folds = adds;
  return plan;
}

namespace {

// As many as there is room for; rows: that decide together.
int stages_of(const Kernels& kernels, SharedMemory room, int qk_dim, int rows) {
  const int fit = stages(room, kernels.shared_bytes, kernels.stage_bytes);
  if (fit == 0)
    throw Error(BLASST_UNSUPPORTED,
                "cuda-sm80: decode with head size " + std::to_string(qk_dim) + " and " +
                    std::to_string(rows) + " query rows that decide together takes " +
                    std::to_string(kernels.shared_bytes + kernels.stage_bytes) +
                    " bytes of shared memory a block; it may have " + std::to_string(room.block));
  return fit;
}

}  // namespace

SharedMemory shared_memory() { return {most_shared_memory(), shared_memory_of_multiprocessor()}; }

void check_room(const blasst_problem& p, SharedMemory room) {
  const auto rows = static_cast<int>(p.heads / p.kv_heads * p.query_length);
  if (rows == 0) return;
  const auto qk_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  // Both types and all variants take the same.
  stages_of(find_kernels(Element::kBFloat16, qk_dim, value_dim, rows, Variant::kDense), room,
            qk_dim, rows);
}

void launch(const Launch& l) { launch(l, shared_memory()); }

// All that can fail on the host comes before the first write.
void launch(const Launch& l, SharedMemory room) {
  const Params& p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  if (p.rows == 0) return report_nothing(p, stream);
  Plan plan = make_plan(p.batch, p.kv_heads, p.keys.length, p.heads / p.kv_heads * p.query_length,
                        l.value_dim);
  place_results(plan, l);
  plan.unit_scale = p.softcap > 0 ? 1.0f : p.scale;

  const Kernels kernels = find_kernels(l.element, l.qk_dim, l.value_dim, plan.rows, variant_of(p));
  const int fit = stages_of(kernels, room, l.qk_dim, plan.rows);
  const Sources sources{l.q, l.k, l.v, fit};
  const int bytes = kernels.shared_bytes + fit * kernels.stage_bytes;
  allow_shared_memory(kernels.attend, bytes);
  allow_shared_memory(kernels.combine, kMostCombineBytes);  // loads it, too
  const int most_blocks = resident_blocks(kernels.attend, kThreads, bytes);
  constexpr int kMostItemTiles = 64;
  const int blocks = deal_out(plan, most_blocks, kMostItemTiles);

  clear_report(p, stream);
  enqueue(kernels.attend, blocks, kThreads, bytes, stream, {&p, &plan, &sources});
  // Not early: what was compiled for a capability before 9.0 has no way to wait.
  enqueue_combine(kernels.combine, p, plan, l.value_dim, false, stream);
}

}  // namespace blasst::cuda::decode::sm80
