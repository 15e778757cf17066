#include "testing/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "testing/element.h"

namespace blasst::check {
namespace {

void must(cudaError_t status) {
  if (status != cudaSuccess) throw Error(BLASST_INTERNAL, cudaGetErrorString(status));
}

template <typename T>
void download(std::vector<T>& host, const void* device) {
  if (device) DeviceMemory::read(host.data(), device, host.size() * sizeof(T));
}

template <typename T>
void upload(const std::vector<T>& host, void* device) {
  if (device) DeviceMemory::write(device, host.data(), host.size() * sizeof(T));
}

// The tensors and arrays that `p`, of the problem, points to.
void copy_problem(blasst_problem& p, const Problem& problem, DeviceMemory& memory) {
  const auto batch = static_cast<size_t>(p.batch), heads = static_cast<size_t>(p.heads);
  const bool values_in_keys = p.kv.v.data == p.kv.k.data;
  for (View* view : {&p.q, &p.out, &p.kv.k}) *view = memory.copy(*view);
  if (values_in_keys)
    p.kv.v.data = p.kv.k.data;
  else
    p.kv.v = memory.copy(p.kv.v);
  p.cu_seqlens_q = memory.copy(p.cu_seqlens_q, batch + 1);
  p.kv.cu_seqlens = memory.copy(p.kv.cu_seqlens, batch + 1);
  p.query_lengths = memory.copy(p.query_lengths, batch);
  p.kv.starts = memory.copy(p.kv.starts, batch);
  p.kv.lengths = memory.copy(p.kv.lengths, batch);
  p.kv.page_table = memory.copy(p.kv.page_table, problem.page_table.size());
  p.sinks = memory.copy(p.sinks, heads);
  p.k_scales.values = memory.copy(p.k_scales.values, problem.k_scales.size());
  p.v_scales.values = memory.copy(p.v_scales.values, problem.v_scales.size());
  p.mask.bands = memory.copy(p.mask.bands, 2 * heads);
}

size_t bytes_of(const View& view) {
  return static_cast<size_t>(view.elements * element_bytes(view.dtype));
}

}  // namespace

GpuKernels portable_kernels(int64_t rows_of_256) {
  return {.backward = false,
          .int8_scores = false,
          .latents = false,
          .caches_in_8_bits = false,
          .prefill_sizes = {std::begin(kHeadSizes), std::end(kHeadSizes)},
          .decode_sizes = {std::begin(kHeadSizes), std::end(kHeadSizes)},
          .rows_of_256 = rows_of_256};
}

const GpuKernels& gpu_kernels() {
  static const GpuKernels kernels = [] {
    AttentionParams params{.problem = {.batch = 1,
                                       .heads = 1,
                                       .kv_heads = 1,
                                       .head_dim = 64,
                                       .value_dim = 64,
                                       .query_length = 1,
                                       .kv = {.key_length = 1}},
                           .execution = {.backend = BLASST_BACKEND_CUDA}};
    blasst::Problem& p = params.problem;
    for (View* view : {&p.q, &p.kv.k, &p.kv.v, &p.out}) view->dtype = BLASST_BFLOAT16;
    if (plan(params, false).backend == BLASST_BACKEND_CUDA_SM80) {
      p.heads = 64, p.head_dim = p.value_dim = 256;
      int64_t rows = 64;
      try {
        plan(params, true);
      } catch (const Error& error) {
        if (error.status() != BLASST_UNSUPPORTED) throw;
        rows = 32;
      }
      return portable_kernels(rows);
    }
    const std::vector<HeadSizes> sizes = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};
    return GpuKernels{.backward = true,
                      .int8_scores = true,
                      .latents = true,
                      .caches_in_8_bits = true,
                      .prefill_sizes = sizes,
                      .decode_sizes = sizes,
                      .rows_of_256 = 64};
  }();
  return kernels;
}

Case for_gpu(Case c) { return for_kernels(std::move(c), gpu_kernels()); }

Case for_kernels(Case c, const GpuKernels& kernels) {
  const std::vector<HeadSizes>& all = kernels.sizes(c.decode);
  constexpr int64_t pages[] = {16, 32, 64, 128, 256};
  if (c.dtype == BLASST_FLOAT32) c.dtype = BLASST_BFLOAT16;
  const HeadSizes sizes = all[c.seed % all.size()];
  c.head_dim = sizes.qk, c.value_dim = sizes.value;
  if (c.scores == BLASST_SCORES_INT8 && !c.decode) c.head_dim = c.value_dim;
  c.values_in_keys = c.values_in_keys && c.decode && kernels.latents;
  c.page_size = pages[c.seed % 5];
  c.padding = (c.padding + 7) / 8 * 8;
  c.blocks = false;
  if (!kernels.int8_scores) c.scores = BLASST_SCORES_EXACT;
  if (c.decode && !kernels.caches_in_8_bits) c.k_dtype = c.v_dtype = {};
  if (c.k_dtype || c.v_dtype) c.padding = (c.padding + 15) / 16 * 16;
  if (!c.decode) {
    c.scales_are_powers = true;  // with others it rounds keys and values once more
    return c;
  }
  if (c.values_in_keys) c.k_dtype = c.v_dtype = {};
  if (c.k_dtype == BLASST_INT8 && !c.v_dtype) {
    c.head_dim = c.value_dim = 128;
  } else if (c.k_dtype || c.v_dtype) {  // both, of one type
    c.k_dtype = c.v_dtype = c.k_dtype.value_or(c.v_dtype.value_or(BLASST_INT8));
    c.head_dim = c.value_dim;
  }
  c.scores = BLASST_SCORES_EXACT;
  c.places = 1;
  c.bands = c.padded = false;
  int64_t most = 4;
  if (c.values_in_keys) {
    c.head_dim = kLatentSizes.qk, c.value_dim = kLatentSizes.value;
  } else {
    const int64_t rows = kernels.most_rows(c.head_dim);  // of a query tile
    c.heads = std::min(c.heads, rows * c.kv_heads);
    most = rows / (c.heads / c.kv_heads);
  }
  for (Lengths& r : c.requests) {
    if (!c.ragged_queries) r.queries = std::max<int64_t>(1, c.requests[0].queries);
    r.queries = std::min(r.queries, most);
  }
  return c;
}

Case differentiable_on_gpu(Case c) {
  c = for_gpu(differentiable(c));
  if (c.layout == Layout::kPaged) c.layout = Layout::kRagged;
  return c;
}

AttentionParams gpu_params(const Problem& problem) {
  AttentionParams p = problem.params;
  p.execution = {.backend = BLASST_BACKEND_CUDA};
  p.report.tile_maxima = nullptr;  // DeviceProblem sets what is reported there
  return p;
}

Plan gpu_plan(const Problem& problem) {
  return plan(gpu_params(problem), problem.description.decode);
}

Comparison compare_on_gpu(const Problem& problem) {
  const Case& c = problem.description;
  const bool float8 = c.decode && c.k_dtype == BLASST_FLOAT8_E4M3;
  return compare(problem, gpu_plan(problem), float8 ? kFloat8Roundoff : kTensorCoreRoundoff);
}

void DeviceMemory::Free::operator()(void* data) const { cudaFree(data); }

void* DeviceMemory::allocate(size_t bytes) {
  void* data = nullptr;
  must(cudaMalloc(&data, std::max<size_t>(1, bytes)));
  buffers_.emplace_back(data);
  return data;
}

View DeviceMemory::copy(View view) {
  view.data = copy(static_cast<const std::byte*>(view.data),
                   static_cast<size_t>(view.elements * element_bytes(view.dtype)));
  return view;
}

void DeviceMemory::write(void* device, const void* host, size_t bytes) {
  must(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
}

void DeviceMemory::read(void* host, const void* device, size_t bytes) {
  must(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}

void synchronize() { must(cudaDeviceSynchronize()); }

DeviceProblem::DeviceProblem(Problem& problem, Reports reports)
    : params(gpu_params(problem)), problem_(problem) {
  Report& report = params.report;
  const bool decode = problem.description.decode;
  const auto copy = [&](const auto& host) { return memory_.copy(host.data(), host.size()); };
  copy_problem(params.problem, problem, memory_);
  TileTest& test = params.decision.test;
  test.values = memory_.copy(test.values, problem.thresholds.size());
  report = {};
  problem.params.report.tile_maxima = nullptr;
  const Plan tiles = plan(params, decode);
  if (reports != Reports::kNone) {
    report.lse = copy(problem.lse);
    report.tiles_visitable = copy(problem.tiles_visitable);
    report.tiles_skipped = copy(problem.tiles_skipped);
  }
  if (reports == Reports::kAll) {
    report.dropped_mass_bound = copy(problem.dropped_mass_bound);
    report.gap_histogram = copy(problem.gap_histogram);
    const int64_t all = tiles.tile_heads * tiles.query_tiles;
    problem.tile_bits.resize(all * tiles.tile_words);
    problem.params.report.tile_bits = problem.tile_bits.data();
    report.tile_bits = copy(problem.tile_bits);
    if (!decode) {
      const auto spare = static_cast<int64_t>(problem.description.seed % 3);
      Report& on_host = problem.params.report;
      on_host.tile_maxima_stride = tiles.key_tiles + spare;
      problem.tile_maxima.resize(all * on_host.tile_maxima_stride);
      on_host.tile_maxima = problem.tile_maxima.data();
      report.tile_maxima = copy(problem.tile_maxima);
      report.tile_maxima_stride = on_host.tile_maxima_stride;
    }
  }
  params.execution.workspace_bytes = tiles.workspace_bytes;
  params.execution.workspace = memory_.allocate(tiles.workspace_bytes);
  must(cudaMemset(params.execution.workspace, 0xff, tiles.workspace_bytes));
}

void DeviceProblem::mark() {
  problem_.mark_outputs();
  DeviceMemory::write(
      params.problem.out.data, problem_.params.problem.out.data,
      static_cast<size_t>(params.problem.out.elements * element_bytes(params.problem.q.dtype)));
  const Report& r = params.report;
  upload(problem_.lse, r.lse);
  upload(problem_.dropped_mass_bound, r.dropped_mass_bound);
  upload(problem_.tiles_visitable, r.tiles_visitable);
  upload(problem_.tiles_skipped, r.tiles_skipped);
  upload(problem_.tile_bits, r.tile_bits);
  upload(problem_.gap_histogram, r.gap_histogram);
  upload(problem_.tile_maxima, r.tile_maxima);
}

void DeviceProblem::launch() { call(params, problem_.description.decode); }

void DeviceProblem::download() {
  synchronize();
  DeviceMemory::read(
      problem_.params.problem.out.data, params.problem.out.data,
      static_cast<size_t>(params.problem.out.elements * element_bytes(params.problem.q.dtype)));
  const Report& r = params.report;
  check::download(problem_.lse, r.lse);
  check::download(problem_.dropped_mass_bound, r.dropped_mass_bound);
  check::download(problem_.tiles_visitable, r.tiles_visitable);
  check::download(problem_.tiles_skipped, r.tiles_skipped);
  check::download(problem_.gap_histogram, r.gap_histogram);
  check::download(problem_.tile_maxima, r.tile_maxima);
  check::download(problem_.tile_bits, r.tile_bits);
}

DeviceBackward::DeviceBackward(BackwardProblem& problem)
    : params(problem.params), problem_(problem) {
  const auto rows = problem.forward.lse.size();
  copy_problem(params.problem, problem.forward, memory_);
  Gradients& g = params.gradients;
  for (View* view : {&g.dout, &g.dq, &g.dk, &g.dv}) *view = memory_.copy(*view);
  g.lse = memory_.copy(g.lse, rows);
  g.dlse = memory_.copy(g.dlse, rows);
  g.tile_bits = memory_.copy(g.tile_bits, problem.forward.tile_bits.size());
  g.dsinks = memory_.copy(g.dsinks, problem.dsinks.size());
  params.execution = {.backend = BLASST_BACKEND_CUDA};
  const Plan plan = backward_plan(params);
  params.execution.workspace_bytes = plan.workspace_bytes;
  params.execution.workspace = memory_.allocate(plan.workspace_bytes);
  must(cudaMemset(params.execution.workspace, 0xff, plan.workspace_bytes));
}

void DeviceBackward::mark() {
  problem_.mark();
  const Gradients &on_host = problem_.params.gradients, &on_device = params.gradients;
  for (const auto& [host, device] :
       {std::pair{&on_host.dq, &on_device.dq}, std::pair{&on_host.dk, &on_device.dk},
        std::pair{&on_host.dv, &on_device.dv}})
    DeviceMemory::write(device->data, host->data, bytes_of(*host));
  upload(problem_.dsinks, on_device.dsinks);
}

void DeviceBackward::launch() { backward(params); }

void DeviceBackward::download() {
  synchronize();
  const Gradients &on_host = problem_.params.gradients, &on_device = params.gradients;
  for (const auto& [host, device] :
       {std::pair{&on_host.dq, &on_device.dq}, std::pair{&on_host.dk, &on_device.dk},
        std::pair{&on_host.dv, &on_device.dv}})
    DeviceMemory::read(host->data, device->data, bytes_of(*host));
  check::download(problem_.dsinks, on_device.dsinks);
}

}  // namespace blasst::check
