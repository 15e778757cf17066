#include "cpu/backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "attention/element.h"
#include "cpu/backward_plan.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/thread_pool.h"
#include "cpu/totals.h"

namespace blasst::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The caller's workspace if it is given and large enough, else memory of the call's own.
class Scratch {
 public:
  Scratch(Workspace workspace, std::size_t bytes) {
    if (workspace.data && workspace.bytes < bytes)
      throw Error(BLASST_INVALID_ARGUMENT,
                  fmt::format("workspace_bytes is {}; this call needs {}", workspace.bytes, bytes));
    if (workspace.data) {
      data_ = static_cast<std::byte*>(workspace.data);
      data_ += aligned(reinterpret_cast<uintptr_t>(data_)) - reinterpret_cast<uintptr_t>(data_);
    } else {
      owned_.reset(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kAlignment})));
      data_ = owned_.get();
    }
  }

  float* take(std::size_t floats) {
    return reinterpret_cast<float*>(std::exchange(data_, data_ + aligned(floats * sizeof(float))));
  }

 private:
  struct Free {
    void operator()(std::byte* data) const {
      ::operator delete (data, std::align_val_t{kAlignment});
    }
  };
  std::unique_ptr<std::byte, Free> owned_;
  std::byte* data_;
};

// Before anything is counted: the report's cells that units only add to start from zero.
void clear_report(const Problem& p, int64_t query_tiles) {
  const Report& report = p.report;
  if (report.tiles_visitable) std::fill_n(report.tiles_visitable, p.batch * p.heads, 0);
  if (report.tiles_skipped) std::fill_n(report.tiles_skipped, p.batch * p.heads, 0);
  if (report.gap_histogram) std::fill_n(report.gap_histogram, p.heads * BLASST_GAP_BINS, 0);
  const int64_t tiles = p.tile_heads() * query_tiles;
  if (report.tile_maxima)
    std::fill_n(report.tile_maxima, tiles * report.tile_maxima_stride,
                -std::numeric_limits<float>::infinity());
  if (report.tile_bits) {
    const int64_t words = attention::ceil_div(attention::ceil_div(p.max_keys, kKeys), 32);
    std::fill_n(report.tile_bits, tiles * words, 0);
  }
}

Totals make_totals(const Problem& p, int64_t query_tiles) {
  return Totals(p, query_tiles, attention::ceil_div(p.max_keys, kKeys));
}

// A sink's probability in a row is exp(sink - lse), and its score takes -probability * delta.
float sink_gradient(const BackwardPlan& plan, int64_t head) {
  const Problem& p = plan.problem.forward;
  double sum = 0;
  for (int64_t at = head * p.rows; at < (head + 1) * p.rows; ++at) {
    const double lse = double{plan.problem.lse[at]} + plan.lse_rest[at];
    // A row with neither a valid key nor a sink has nothing for the sink to scale.
    if (lse > -std::numeric_limits<double>::infinity())
      sum -= std::exp(p.sinks[head] - lse) * plan.delta[at];
  }
  return static_cast<float>(sum);
}

// Rows of dk and dv that are no request's keys.
void clear_unused_keys(const attention::BackwardProblem& b) {
  const Problem& p = b.forward;
  if (p.kv.cu_seqlens) return;
  const auto [outer, tokens] = p.key_tensor();
  std::vector<int64_t> used(outer, 0);  // of each request's or page's tokens, from the first
  for (int64_t request = 0; request < p.batch; ++request) {
    const int64_t keys = p.requests[request].keys;
    if (!p.kv.page_table) used[request] = keys;
    for (int64_t first = 0; p.kv.page_table && first < keys; first += tokens)
      used[p.page_of(request, first)] = std::min(tokens, keys - first);
  }
  const int64_t bytes = attention::element_bytes(p.dtype);
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t token = used[i]; token < tokens; ++token) {
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        std::fill_n(attention::row_at(b.dk, p.dtype, i, token, head), p.head_dim * bytes,
                    std::byte{0});
        std::fill_n(attention::row_at(b.dv, p.dtype, i, token, head), p.value_dim * bytes,
                    std::byte{0});
      }
    }
  }
}

std::size_t backward_workspace_bytes(const BackwardPlan& plan, int threads) {
  return kAlignment +
         threads * aligned(backward_scratch_floats(plan.problem.forward) * sizeof(float)) +
         2 * aligned(plan.row_floats() * sizeof(float)) + aligned(plan.dq_floats() * sizeof(float));
}

}  // namespace

std::size_t prefill_workspace_bytes(const Problem& p, int threads) {
  return kAlignment + threads * aligned(prefill_scratch_floats(p) * sizeof(float));
}

namespace {

// Floats of one thread's scratch in decode: a slice for every query tile that a unit may have.
size_t decode_thread_floats(const Problem& p) {
  return std::min<int64_t>(p.kv_heads, kUnitHeads) * decode_scratch_floats(p);
}

}  // namespace

std::size_t decode_workspace_bytes(const Problem& p, int threads) {
  const std::vector<QueryTile> tiles = p.query_tiles(kQueryRows);
  const std::vector<DecodeUnit> units = decode_units(p, tiles, threads);
  return kAlignment + threads * aligned(decode_thread_floats(p) * sizeof(float)) +
         decode_partials(units) * aligned(decode_partial_floats(p) * sizeof(float));
}

std::size_t backward_workspace_bytes(const attention::BackwardProblem& b, int threads) {
  attention::check_block_mask(b.forward, prefill_shape());
  return backward_workspace_bytes(BackwardPlan(b), threads);
}

void prefill(const Problem& p, int threads, Workspace workspace) {
  const Kernels& kernel = kernels(p.dtype);
  attention::check_block_mask(p, prefill_shape());
  attention::check_tile_maxima(p, prefill_shape());
  const std::vector<QueryTile> tiles = p.query_tiles(kQueryRows);
  const std::vector<PrefillUnit> units = prefill_units(p, tiles);
  Scratch scratch(workspace, prefill_workspace_bytes(p, threads));
  std::vector<float*> worker_scratch(threads);
  for (float*& s : worker_scratch) s = scratch.take(prefill_scratch_floats(p));
  const int64_t query_tiles = p.query_tile_count(kQueryRows);
  clear_report(p, query_tiles);
  Totals totals = make_totals(p, query_tiles);
  parallel_for(std::ssize(units), threads, [&](int64_t i, int worker) {
    kernel.prefill(p, units[i], totals, worker_scratch[worker]);
  });
}

void decode(const Problem& p, int threads, Workspace workspace) {
  const Kernels& kernel = kernels(p.dtype);
  attention::check_block_mask(p, decode_shape(p));
  attention::check_tile_maxima(p, decode_shape(p));
  const std::vector<QueryTile> tiles = p.query_tiles(kQueryRows);
  const std::vector<DecodeUnit> units = decode_units(p, tiles, threads);
  Scratch scratch(workspace, decode_workspace_bytes(p, threads));
  std::vector<float*> worker_scratch(threads);
  for (float*& s : worker_scratch) s = scratch.take(decode_thread_floats(p));
  std::vector<Partial> partials;
  for (int64_t i = 0; i < decode_partials(units); ++i)
    partials.push_back(decode_partial(p, scratch.take(decode_partial_floats(p))));
  clear_report(p, p.batch);
  Totals totals = make_totals(p, p.batch);
  std::vector<const DecodeUnit*> firsts;  // of the splits that begin a visit
  for (const DecodeUnit& unit : units) {
    if (unit.split == 0) firsts.push_back(&unit);
  }
  if (takes_seeds(p)) {
    parallel_for(std::ssize(firsts), threads, [&](int64_t i, int worker) {
      if (firsts[i]->splits > 1)
        kernel.decode_seeds(p, *firsts[i], totals, worker_scratch[worker], partials.data());
    });
  }
  parallel_for(std::ssize(units), threads, [&](int64_t i, int worker) {
    kernel.decode(p, units[i], totals, worker_scratch[worker], partials.data());
  });
  parallel_for(std::ssize(firsts), threads, [&](int64_t i, int) {
    const DecodeUnit& unit = *firsts[i];
    for (size_t t = 0; t < unit.tiles.size(); ++t)
      kernel.combine(p, unit.tiles[t], &partials[unit.first_partial(t)], unit.splits);
  });
}

void backward(const attention::BackwardProblem& b, int threads, Workspace workspace) {
  attention::check_block_mask(b.forward, prefill_shape());
  BackwardPlan plan(b);
  Scratch scratch(workspace, backward_workspace_bytes(plan, threads));
  std::vector<float*> worker_scratch(threads);
  for (float*& s : worker_scratch) s = scratch.take(backward_scratch_floats(b.forward));
  plan.delta = scratch.take(plan.row_floats());
  plan.lse_rest = scratch.take(plan.row_floats());
  plan.dq = scratch.take(plan.dq_floats());
  const Kernels& kernel = kernels(b.forward.dtype);
  const auto tiles = std::ssize(plan.tiles);
  parallel_for(tiles, threads, [&](int64_t i, int worker) {
    kernel.backward_rows(plan, plan.tiles[i], worker_scratch[worker]);
  });
  parallel_for(std::ssize(plan.units), threads, [&](int64_t i, int worker) {
    kernel.backward(plan, plan.units[i], worker_scratch[worker]);
  });
  parallel_for(tiles, threads,
               [&](int64_t i, int) { kernel.backward_finish(plan, plan.tiles[i].query); });
  clear_unused_keys(b);
  if (b.dsinks) {
    parallel_for(b.forward.heads, threads,
                 [&](int64_t head, int) { b.dsinks[head] = sink_gradient(plan, head); });
  }
}

}  // namespace blasst::cpu
