#include "cpu/backend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/backward/plan.h"
#include "cpu/int8/keys.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/processors.h"
#include "cpu/thread_pool.h"
#include "cpu/totals.h"
#include "problem/checks.h"
#include "problem/element.h"
#include "problem/float_environment.h"
#include "problem/problem.h"
#include "problem/text.h"

namespace blasst::cpu {
namespace {

using problem::Geometry;
using problem::Phase;

constexpr std::size_t kAlignment = 64;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The caller's workspace if it is given and large enough, else memory of the call's own.
class Scratch {
 public:
  Scratch(const Execution& execution, std::size_t bytes) {
    if (execution.workspace && execution.workspace_bytes < bytes)
      throw Error(BLASST_INVALID_ARGUMENT, formatted("workspace_bytes is {}; this call needs {}",
                                                     execution.workspace_bytes, bytes));
    if (execution.workspace) {
      data_ = static_cast<std::byte*>(execution.workspace);
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
void clear_report(const Problem& p, const Geometry& g) {
  const Report& report = p.report;
  if (report.tiles_visitable) std::fill_n(report.tiles_visitable, p.batch * p.heads, 0);
  if (report.tiles_skipped) std::fill_n(report.tiles_skipped, p.batch * p.heads, 0);
  if (report.gap_histogram) std::fill_n(report.gap_histogram, p.heads * BLASST_GAP_BINS, 0);
  const int64_t tiles = g.tile_heads * g.query_tiles;
  if (report.tile_maxima)
    std::fill_n(report.tile_maxima, tiles * report.tile_maxima_stride,
                -std::numeric_limits<float>::infinity());
  if (report.tile_bits) std::fill_n(report.tile_bits, tiles * g.tile_words, 0);
}

// Rows of a padded batch that are padding: output 0.
void clear_padding(const Problem& p) {
  p.for_padding([&](int64_t request, int64_t row) {
    const int64_t token = row - request * p.max_rows;
    for (int64_t head = 0; head < p.heads; ++head) {
      std::fill_n(problem::row_at(p.out, request, token, head),
                  p.value_dim * problem::element_bytes(p.dtype), std::byte{0});
      const int64_t cell = head * p.rows + row;
      if (p.report.lse) p.report.lse[cell] = p.padding_lse(request, row, head);
      if (p.report.dropped_mass_bound) p.report.dropped_mass_bound[cell] = 0;
    }
  });
}

// A sink's probability in a row is exp(sink - lse), and its score takes -probability * delta.
float sink_gradient(const BackwardPlan& plan, int64_t head) {
  const Problem& p = plan.problem.forward;
  double sum = 0;
  for (int64_t at = head * p.rows; at < (head + 1) * p.rows; ++at) {
    const double lse = double{plan.problem.lse[at]} + plan.lse_rest[at];
    // A row with neither a valid key nor a sink (one of -inf is none) has nothing for it to scale.
    if (lse > -std::numeric_limits<double>::infinity())
      sum -= std::exp(p.sinks[head] - lse) * plan.delta[at];
  }
  p.for_padding([&](int64_t request, int64_t row) {
    if (plan.problem.dlse && p.has_sink_alone(request, row) &&
        p.sinks[head] > -std::numeric_limits<float>::infinity())
      sum += plan.problem.dlse[head * p.rows + row];
  });
  return static_cast<float>(sum);
}

// Rows that are padding have no output.
void clear_unused_rows(const BackwardPlan& plan) {
  const problem::BackwardProblem& b = plan.problem;
  const Problem& p = b.forward;
  p.for_padding([&](int64_t request, int64_t row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      std::fill_n(problem::row_at(b.dq, request, row - request * p.max_rows, head),
                  p.head_dim * problem::element_bytes(p.dtype), std::byte{0});
      const int64_t cell = head * p.rows + row;
      plan.delta[cell] = plan.lse_rest[cell] = 0;
    }
  });
}

// Rows of dk and dv that are no request's keys.
void clear_unused_keys(const problem::BackwardProblem& b) {
  const Problem& p = b.forward;
  if (p.kv.layout == BLASST_LAYOUT_RAGGED) return;
  const auto [outer, tokens] = p.key_tensor();
  std::vector<Range> used(outer);  // of each request's or page's tokens
  for (int64_t request = 0; request < p.batch; ++request) {
    const auto [first, end] = Range{p.requests[request].first_key,
                                    p.requests[request].first_key + p.requests[request].keys};
    if (p.kv.layout == BLASST_LAYOUT_DENSE) used[request] = {first, end};
    if (p.kv.layout == BLASST_LAYOUT_DENSE) continue;
    for (int64_t token = 0; token < end; token += tokens)
      used[p.page_of(request, token)] = {0, std::min(tokens, end - token)};
  }
  const int64_t bytes = problem::element_bytes(p.dtype);
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t token = 0; token < tokens; ++token) {
      if (token >= used[i].begin && token < used[i].end) continue;
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        std::fill_n(problem::row_at(b.dk, i, token, head), p.head_dim * bytes, std::byte{0});
        std::fill_n(problem::row_at(b.dv, i, token, head), p.value_dim * bytes, std::byte{0});
      }
    }
  }
}

// Floats of one thread's scratch in decode: a slice for every query tile that a unit may have.
std::size_t decode_thread_floats(const Problem& p) {
  return std::min<int64_t>(p.kv_heads, kUnitHeads) * decode_scratch_floats(p);
}

std::size_t prefill_workspace_bytes(const Problem& p, int threads) {
  const std::size_t int8 = p.scores == BLASST_SCORES_INT8 ? int8_key_floats(p) : 0;
  return kAlignment + threads * aligned(prefill_scratch_floats(p) * sizeof(float)) +
         aligned(int8 * sizeof(float));
}

std::size_t decode_workspace_bytes(const Problem& p, int threads) {
  return kAlignment + threads * aligned(decode_thread_floats(p) * sizeof(float)) +
         most_decode_partials(p) * aligned(decode_partial_floats(p) * sizeof(float));
}

std::size_t backward_workspace_bytes(const Problem& p, int threads) {
  return kAlignment + threads * aligned(backward_scratch_floats(p) * sizeof(float)) +
         2 * aligned(backward_row_floats(p) * sizeof(float)) +
         aligned(backward_dq_floats(p) * sizeof(float));
}

// Scratch for each thread.
std::vector<float*> take_scratch(Scratch& scratch, int threads, std::size_t floats) {
  std::vector<float*> of_worker(threads);
  for (float*& s : of_worker) s = scratch.take(floats);
  return of_worker;
}

// The keys of a call whose scores are in int8.
Int8Keys quantize_keys(const Problem& p, const Kernels& kernel, float* storage,
                       const std::vector<float*>& of_worker) {
  Int8Keys keys(p, storage);
  const auto threads = static_cast<int>(of_worker.size());
  parallel_for(p.batch * p.kv_heads, threads,
               [&](int64_t i, int) { kernel.int8.mean(p, keys, i / p.kv_heads, i % p.kv_heads); });
  parallel_for(p.kv_heads * keys.tiles(), threads, [&](int64_t i, int worker) {
    const int64_t tile = i / p.kv_heads, request = keys.request_of(tile);
    kernel.int8.quantize(p, keys, request, i % p.kv_heads, tile - keys.first_tile(request),
                         of_worker[worker]);
  });
  return keys;
}

void prefill(const Problem& p, const Plan& plan, int threads, const Execution& execution) {
  const Kernels& kernel = kernels(p.dtype);
  const Geometry g = p.geometry(plan.shape);
  const std::vector<QueryTile> tiles = p.query_tiles(kQueryRows);
  const std::vector<PrefillUnit> units = prefill_units(p, tiles);
  Scratch scratch(execution, plan.workspace_bytes);
  const std::vector<float*> of_worker = take_scratch(scratch, threads, prefill_scratch_floats(p));
  clear_report(p, g);
  clear_padding(p);
  Totals totals(p, g);
  if (p.scores == BLASST_SCORES_INT8) {
    const Int8Keys keys = quantize_keys(p, kernel, scratch.take(int8_key_floats(p)), of_worker);
    parallel_for(std::ssize(units), threads, [&](int64_t i, int worker) {
      kernel.int8.prefill(p, keys, units[i], totals, of_worker[worker]);
    });
    return;
  }
  parallel_for(std::ssize(units), threads, [&](int64_t i, int worker) {
    kernel.prefill(p, units[i], totals, of_worker[worker]);
  });
}

void decode(const Problem& p, const Plan& plan, int threads, const Execution& execution) {
  const Kernels& kernel = kernels(p.dtype);
  const Geometry g = p.geometry(plan.shape);
  const std::vector<QueryTile> tiles = p.query_tiles(plan.shape.query_rows);
  const std::vector<DecodeUnit> units = decode_units(p, tiles, threads);
  Scratch scratch(execution, plan.workspace_bytes);
  const std::vector<float*> of_worker = take_scratch(scratch, threads, decode_thread_floats(p));
  std::vector<Partial> partials;
  for (int64_t i = 0; i < decode_partials(units); ++i)
    partials.push_back(decode_partial(p, scratch.take(decode_partial_floats(p))));
  clear_report(p, g);
  clear_padding(p);
  Totals totals(p, g);
  std::vector<const DecodeUnit*> firsts;  // of the splits that begin a visit
  for (const DecodeUnit& unit : units) {
    if (unit.split == 0) firsts.push_back(&unit);
  }
  if (takes_seeds(p)) {
    parallel_for(std::ssize(firsts), threads, [&](int64_t i, int worker) {
      if (firsts[i]->splits > 1)
        kernel.decode_seeds(p, *firsts[i], totals, of_worker[worker], partials.data());
    });
  }
  parallel_for(std::ssize(units), threads, [&](int64_t i, int worker) {
    kernel.decode(p, units[i], totals, of_worker[worker], partials.data());
  });
  parallel_for(std::ssize(firsts), threads, [&](int64_t i, int) {
    const DecodeUnit& unit = *firsts[i];
    for (size_t t = 0; t < unit.tiles.size(); ++t)
      kernel.combine(p, unit.tiles[t], &partials[unit.first_partial(t)], unit.splits);
  });
}

void backward(const problem::BackwardProblem& b, const Plan& of_call, int threads,
              const Execution& execution) {
  BackwardPlan plan(b);
  Scratch scratch(execution, of_call.workspace_bytes);
  const std::vector<float*> of_worker =
      take_scratch(scratch, threads, backward_scratch_floats(b.forward));
  plan.delta = scratch.take(backward_row_floats(b.forward));
  plan.lse_rest = scratch.take(backward_row_floats(b.forward));
  plan.dq = scratch.take(backward_dq_floats(b.forward));
  const Kernels& kernel = kernels(b.forward.dtype);
  const auto tiles = std::ssize(plan.tiles);
  parallel_for(tiles, threads, [&](int64_t i, int worker) {
    kernel.backward_rows(plan, plan.tiles[i], of_worker[worker]);
  });
  parallel_for(std::ssize(plan.units), threads, [&](int64_t i, int worker) {
    kernel.backward(plan, plan.units[i], of_worker[worker]);
  });
  parallel_for(tiles, threads,
               [&](int64_t i, int) { kernel.backward_finish(plan, plan.tiles[i].query); });
  clear_unused_rows(plan);
  clear_unused_keys(b);
  if (b.dsinks) {
    parallel_for(b.forward.heads, threads,
                 [&](int64_t head, int) { b.dsinks[head] = sink_gradient(plan, head); });
  }
}

void check_supported(const Execution& execution) {
  if (execution.stream) throw Error(BLASST_UNSUPPORTED, "cpu: stream is set; it is for cuda");
}

Plan plan_of(const Problem& p, TileShape shape, std::size_t workspace_bytes) {
  return problem::plan_of(BLASST_BACKEND_CPU, p.geometry(shape), workspace_bytes);
}

class Cpu : public api::Backend {
 public:
  blasst_backend id() const override { return BLASST_BACKEND_CPU; }

  BackendInfo info() const override {
    return {BLASST_BACKEND_CPU, "cpu", isa_name(), true,
            formatted("{} threads", default_threads())};
  }

  std::string obstacle(api::Memory memory) const override {
    return memory.host ? "" : "the tensors are in the memory of a GPU";
  }

  Plan plan(const AttentionParams& params, Phase phase) const override {
    const Problem p = problem::make_scalar_problem(params, phase);
    problem::check_types("cpu", "attention", problem::Caches::kOfQueriesOr8Bits, params.problem);
    check_supported(params.execution);
    const int threads = threads_of(params.execution.threads);
    const bool decode = phase == Phase::kDecode;
    if (decode) problem::check_exact_scores("cpu", "decode", params.decision);
    const TileShape shape = decode ? decode_shape(p) : prefill_shape();
    problem::check_tiles("cpu", params.decision, shape);
    return plan_of(
        p, shape,
        decode ? decode_workspace_bytes(p, threads) : prefill_workspace_bytes(p, threads));
  }

  Plan plan(const BackwardParams& params) const override {
    problem::check_scalars(params);
    problem::check_types("cpu", "backward", problem::Caches::kOfQueries, params.problem);
    check_supported(params.execution);
    const Problem p = problem::make_scalar_problem(problem::forward_of(params), Phase::kPrefill);
    return plan_of(p, prefill_shape(),
                   backward_workspace_bytes(p, threads_of(params.execution.threads)));
  }

  void run(const AttentionParams& params, Phase phase) const override {
    const problem::DefaultFloatEnvironment environment;
    const Plan of_call = plan(params, phase);
    const Problem p = problem::make_problem(params, phase);
    const Geometry g = p.geometry(of_call.shape);
    problem::check_block_mask(p, of_call.shape);
    problem::check_tile_maxima(p.report, g);
    const int threads = threads_of(params.execution.threads);
    if (phase == Phase::kDecode) {
      decode(p, of_call, threads, params.execution);
    } else {
      prefill(p, of_call, threads, params.execution);
    }
  }

  void run(const BackwardParams& params) const override {
    const problem::DefaultFloatEnvironment environment;
    const Plan of_call = plan(params);
    const problem::BackwardProblem b = problem::make_problem(params);
    problem::check_block_mask(b.forward, of_call.shape);
    backward(b, of_call, threads_of(params.execution.threads), params.execution);
  }

  void merge(const MergeParams& params) const override {
    const problem::DefaultFloatEnvironment environment;
    problem::check_merge(params);
    for (const View* view : {&params.out_a, &params.out_b}) {
      if (view->dtype != params.out.dtype)
        throw Error(BLASST_UNSUPPORTED, "cpu: out_a, out_b and out are of different types");
    }
    check_supported(params.execution);
    cpu::merge(params, threads_of(params.execution.threads));
  }
};

}  // namespace

const api::Backend& backend() {
  static const Cpu cpu;
  return cpu;
}

}  // namespace blasst::cpu
