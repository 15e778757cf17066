#include "testing/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>

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

}  // namespace

Case for_gpu(Case c) {
  constexpr int64_t dims[] = {64, 128, 256};
  constexpr int64_t pages[] = {16, 32, 64, 128, 256};
  if (c.dtype == BLASST_FLOAT32) c.dtype = BLASST_BFLOAT16;
  c.head_dim = c.value_dim = dims[c.seed % 3];
  c.page_size = pages[c.seed % 5];
  c.padding = (c.padding + 7) / 8 * 8;
  c.blocks = false;
  if (!c.decode) return c;
  c.scores = BLASST_SCORES_EXACT;
  c.places = 1;
  c.bands = c.ragged_queries = c.padded = false;
  const int64_t most = std::min<int64_t>(c.requests[0].queries, 64 / (c.heads / c.kv_heads));
  for (Lengths& r : c.requests) r.queries = std::max<int64_t>(1, most);
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
  blasst_problem& p = params.problem;
  Report& report = params.report;
  const bool decode = problem.description.decode;
  const auto batch = static_cast<size_t>(p.batch), heads = static_cast<size_t>(p.heads);
  const auto copy = [&](const auto& host) { return memory_.copy(host.data(), host.size()); };
  for (View* view : {&p.q, &p.out, &p.kv.k, &p.kv.v}) *view = memory_.copy(*view);
  p.cu_seqlens_q = memory_.copy(p.cu_seqlens_q, batch + 1);
  p.kv.cu_seqlens = memory_.copy(p.kv.cu_seqlens, batch + 1);
  p.query_lengths = memory_.copy(p.query_lengths, batch);
  p.kv.starts = memory_.copy(p.kv.starts, batch);
  p.kv.lengths = memory_.copy(p.kv.lengths, batch);
  p.kv.page_table = memory_.copy(p.kv.page_table, problem.page_table.size());
  TileTest& test = params.decision.test;
  test.values = memory_.copy(test.values, problem.thresholds.size());
  p.sinks = memory_.copy(p.sinks, heads);
  p.mask.bands = memory_.copy(p.mask.bands, 2 * heads);
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

}  // namespace blasst::check
