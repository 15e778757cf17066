#include "check/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "check/element.h"

namespace blasst::check {
namespace {

void must(cudaError_t status) {
  if (status != cudaSuccess) throw Error(BLASST_INTERNAL, cudaGetErrorString(status));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
void download(std::vector<T>& host, const void* device) {
  if (device) DeviceMemory::read(host.data(), device, host.size() * sizeof(T));
}

template <typename T>
void upload(const std::vector<T>& host, void* device) {
  if (device) DeviceMemory::write(device, host.data(), host.size() * sizeof(T));
}

int64_t most_keys(const Problem& problem) {
  int64_t most = 0;
  for (const Lengths& r : problem.description.requests) most = std::max(most, r.keys);
  return most;
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
  c.places = 1;
  c.bands = false;
  const int64_t most = 64 / (c.heads / c.kv_heads);
  for (Lengths& r : c.requests) r.queries = std::min(r.queries, most);
  return c;
}

PrefillParams gpu_params(const Problem& problem) {
  PrefillParams p = problem.params;
  p.backend = BLASST_BACKEND_CUDA_SM90;
  p.threads = 0;
  p.report.tile_maxima = nullptr;  // DeviceProblem sets what is reported there
  int64_t rows = 0, most_rows = 0;
  for (const Lengths& r : problem.description.requests) {
    rows += r.queries;
    most_rows = std::max(most_rows, r.queries);
  }
  if (p.cu_seqlens_q) p.query_length = most_rows, p.rows = rows;
  if (p.kv.cu_seqlens || p.kv.page_table) p.kv.key_length = most_keys(problem);
  return p;
}

TileShape gpu_tile_shape(const Problem& problem) {
  return tile_shape(gpu_params(problem), problem.description.decode);
}

void DeviceMemory::Free::operator()(void* data) const { cudaFree(data); }

void* DeviceMemory::allocate(size_t bytes) {
  void* data = nullptr;
  must(cudaMalloc(&data, std::max<size_t>(1, bytes)));
  buffers_.emplace_back(data);
  return data;
}

View DeviceMemory::copy(View view, DType dtype) {
  view.data = copy(static_cast<const std::byte*>(view.data),
                   static_cast<size_t>(view.elements * element_bytes(dtype)));
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
  PrefillParams& p = params;
  const bool decode = problem.description.decode;
  const auto batch = static_cast<size_t>(p.batch), heads = static_cast<size_t>(p.heads);
  const auto copy = [&](const auto& host) { return memory_.copy(host.data(), host.size()); };
  p.q = memory_.copy(p.q, p.dtype);
  p.out = memory_.copy(p.out, p.dtype);
  p.kv.k = memory_.copy(p.kv.k, p.dtype);
  p.kv.v = memory_.copy(p.kv.v, p.dtype);
  p.cu_seqlens_q = memory_.copy(p.cu_seqlens_q, batch + 1);
  p.kv.cu_seqlens = memory_.copy(p.kv.cu_seqlens, batch + 1);
  p.kv.lengths = memory_.copy(p.kv.lengths, batch);
  p.kv.page_table = memory_.copy(p.kv.page_table, problem.page_table.size());
  p.test.values = memory_.copy(p.test.values, problem.thresholds.size());
  p.sinks = memory_.copy(p.sinks, heads);
  p.mask.bands = memory_.copy(p.mask.bands, 2 * heads);
  p.report = {};
  problem.params.report.tile_maxima = nullptr;
  if (reports != Reports::kNone) {
    p.report.lse = copy(problem.lse);
    p.report.tiles_visitable = copy(problem.tiles_visitable);
    p.report.tiles_skipped = copy(problem.tiles_skipped);
  }
  if (reports == Reports::kAll) {
    p.report.dropped_mass_bound = copy(problem.dropped_mass_bound);
    p.report.gap_histogram = copy(problem.gap_histogram);
    const TileShape shape = tile_shape(p, decode);
    int64_t query_tiles = 0;
    for (const Lengths& r : problem.description.requests)
      query_tiles += ceil_div(r.queries, shape.query_rows);
    words_ = ceil_div(ceil_div(p.kv.key_length, shape.keys), 32);
    bits_.assign((decode ? p.kv_heads * p.batch : p.heads * query_tiles) * words_, 0);
    p.report.tile_bits = copy(bits_);
    if (!decode) {
      const auto spare = static_cast<int64_t>(problem.description.seed % 3);
      Report& report = problem.params.report;
      report.tile_maxima_stride = ceil_div(p.kv.key_length, shape.keys) + spare;
      problem.tile_maxima.resize(p.heads * query_tiles * report.tile_maxima_stride);
      report.tile_maxima = problem.tile_maxima.data();
      p.report.tile_maxima = copy(problem.tile_maxima);
      p.report.tile_maxima_stride = report.tile_maxima_stride;
    }
  }
  p.workspace_bytes = 0;
  p.workspace = nullptr;
  p.workspace_bytes = workspace_bytes(p, decode);
  p.workspace = memory_.allocate(p.workspace_bytes);
  must(cudaMemset(p.workspace, 0xff, p.workspace_bytes));
}

void DeviceProblem::mark() {
  problem_.mark_outputs();
  DeviceMemory::write(params.out.data, problem_.params.out.data,
                      static_cast<size_t>(params.out.elements * element_bytes(params.dtype)));
  const Report& r = params.report;
  upload(problem_.lse, r.lse);
  upload(problem_.dropped_mass_bound, r.dropped_mass_bound);
  upload(problem_.tiles_visitable, r.tiles_visitable);
  upload(problem_.tiles_skipped, r.tiles_skipped);
  std::ranges::fill(bits_, 0xffffffff);
  upload(bits_, r.tile_bits);
  upload(problem_.gap_histogram, r.gap_histogram);
  upload(problem_.tile_maxima, r.tile_maxima);
}

void DeviceProblem::launch() { call(params, problem_.description.decode); }

void DeviceProblem::download() {
  synchronize();
  DeviceMemory::read(problem_.params.out.data, params.out.data,
                     static_cast<size_t>(params.out.elements * element_bytes(params.dtype)));
  const Report& r = params.report;
  check::download(problem_.lse, r.lse);
  check::download(problem_.dropped_mass_bound, r.dropped_mass_bound);
  check::download(problem_.tiles_visitable, r.tiles_visitable);
  check::download(problem_.tiles_skipped, r.tiles_skipped);
  check::download(problem_.gap_histogram, r.gap_histogram);
  check::download(problem_.tile_maxima, r.tile_maxima);
  if (r.tile_bits) download_bits();
}

// The problem's words are of the longest request's keys, the GPU's of key_length.
void DeviceProblem::download_bits() {
  check::download(bits_, params.report.tile_bits);
  const TileShape shape = tile_shape(params, problem_.description.decode);
  const int64_t used = ceil_div(ceil_div(most_keys(problem_), shape.keys), 32);
  problem_.tile_bits.clear();
  for (size_t i = 0; i < bits_.size(); ++i) {
    if (static_cast<int64_t>(i) % words_ < used)
      problem_.tile_bits.push_back(bits_[i]);
    else if (bits_[i] != 0)
      throw Error(BLASST_INTERNAL, "a tile behind the last key is kept");
  }
  problem_.params.report.tile_bits = problem_.tile_bits.data();
}

}  // namespace blasst::check
