#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <random>
#include <string>

#include "blasst/blasst.hpp"
#include "cuda/core/decode/launch.h"
#include "cuda/core/decode/splits.h"
#include "cuda/core/runtime.h"

namespace blasst::cuda::decode {

Plan plan_splits(int batch, int kv_heads, int key_length, int rows, SplitRule rule,
                 bool whole_groups) {
  Plan plan{};
  plan.rows = rows;
  plan.least_split_tiles = rule.least_tiles;
  plan.most_splits = rule.most;
  plan.whole_groups = plan.folds = whole_groups;
  plan.result_slots = ceil_div(split_slots(key_length, rule.least_tiles, rule.most),
                               whole_groups ? kGroupSplits : 1);
  const int64_t results = int64_t{batch} * kv_heads * plan.result_slots;
  if (results > 1 << 30)
    throw Error(BLASST_UNSUPPORTED, "cuda: decode of batch " + std::to_string(batch) + " has " +
                                        std::to_string(results) + " splits; at most " +
                                        std::to_string(1 << 30) + " are supported");
  plan.results = static_cast<int>(results);
  return plan;
}

std::size_t place_results(Plan& plan, int value_dim, void* workspace) {
  std::size_t at = 0;
  const auto take = [&](std::size_t bytes) {
    std::byte* here = static_cast<std::byte*>(workspace) + at;
    at += (bytes + 255) / 256 * 256;
    return here;
  };
  const std::size_t rows = std::size_t(plan.results) * plan.rows;
  plan.partial = reinterpret_cast<float*>(take(rows * value_dim * sizeof(float)));
  plan.statistics = reinterpret_cast<float*>(take(rows * kStatistics * sizeof(float)));
  plan.dropped = reinterpret_cast<int*>(take(std::size_t(plan.results) * sizeof(int)));
  plan.turns.signature = reinterpret_cast<unsigned long long*>(
      take(sizeof(*plan.turns.signature) + sizeof(*plan.turns.taken)));
  plan.turns.taken = reinterpret_cast<int*>(plan.turns.signature + 1);
  return at;
}

void place_results(Plan& plan, const Launch& l) {
  const std::size_t needed = place_results(plan, l.value_dim, l.workspace);
  if (l.workspace_bytes < needed)
    throw Error(BLASST_INVALID_ARGUMENT, "workspace_bytes is " + std::to_string(l.workspace_bytes) +
                                             "; this call needs " + std::to_string(needed));
}

std::uint64_t new_signature() {
  static std::atomic<std::uint64_t> next = [] {
    std::random_device random;
    return std::uint64_t{random()} << 32 | random();
  }();
  std::uint64_t signature;
  do {
    signature = next++;
  } while (signature == 0 || ~signature == 0);
  return signature;
}

int deal_out(Plan& plan, int blocks, int most_item_tiles) {
  plan.blocks = blocks;
  plan.most_item_tiles = most_item_tiles;
  plan.turns.of_launch = new_signature();
  if (plan.results <= blocks) plan.turns.signature = nullptr;
  return std::min(plan.results, blocks);
}

Variant variant_of(const Params& p) {
  if (p.report.tile_bits || p.report.gap_histogram || p.report.dropped_mass_bound)
    return Variant::kReport;
  return p.test.kind == BLASST_TEST_NONE ? Variant::kDense : Variant::kSparse;
}

void clear_report(const Params& p, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const auto heads = static_cast<std::size_t>(p.heads);
  clear(p.report.tile_bits,
        sizeof(*p.report.tile_bits) * p.kv_heads * p.batch * std::size_t(p.report.tile_words),
        stream);
  clear(p.report.gap_histogram, sizeof(*p.report.gap_histogram) * heads * BLASST_GAP_BINS, stream);
}

void report_nothing(const Params& p, void* stream) {
  clear_report(p, stream);
  for (auto* tiles : {p.report.visitable, p.report.skipped})
    clear(tiles, sizeof *tiles * p.batch * p.heads, static_cast<cudaStream_t>(stream));
}

void enqueue_combine(const void* kernel, const Params& p, const Plan& plan, int value_dim,
                     bool early, void* stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  const int slices = p.batch * p.kv_heads * plan.rows * combine_slices(value_dim);
  const int warps = combine_warps(slices);
  config.gridDim = dim3(adds_in_warp(plan, slices) ? ceil_div(slices, warps) : slices);
  config.dynamicSmemBytes = combine_shared_bytes(plan, slices, value_dim);
  config.blockDim = dim3(32 * warps);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&p), const_cast<Plan*>(&plan)};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC");
}

}  // namespace blasst::cuda::decode
