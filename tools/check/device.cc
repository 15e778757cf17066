#include "check/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace blasst::check {
namespace {

void must(cudaError_t status) {
  if (status != cudaSuccess) throw Error(BLASST_INTERNAL, cudaGetErrorString(status));
}

// Device memory of one call.
class Arena {
 public:
  template <typename T>
  T* allocate(size_t count) {
    void* data = nullptr;
    must(cudaMalloc(&data, std::max<size_t>(1, count) * sizeof(T)));
    buffers_.emplace_back(data);
    return static_cast<T*>(data);
  }

  // A copy on the device; null stays null.
  template <typename T>
  T* copy(const T* host, size_t count) {
    if (!host) return nullptr;
    T* device = allocate<T>(count);
    must(cudaMemcpy(device, host, count * sizeof(T), cudaMemcpyHostToDevice));
    return device;
  }
  template <typename T>
  T* copy(const std::vector<T>& host) {
    return host.empty() ? nullptr : copy(host.data(), host.size());
  }

  View copy(View view, int64_t element_bytes) {
    view.data = copy(static_cast<const std::byte*>(view.data),
                     static_cast<size_t>(view.elements * element_bytes));
    return view;
  }

 private:
  struct Free {
    void operator()(void* data) const { cudaFree(data); }
  };
  std::vector<std::unique_ptr<void, Free>> buffers_;
};

template <typename T>
void download(std::vector<T>& host, const void* device) {
  if (device)
    must(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
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
  c.places = 1;
  if (!c.decode) return c;
  c.bands = false;
  const int64_t most = 64 / (c.heads / c.kv_heads);
  for (Lengths& r : c.requests) r.queries = std::min(r.queries, most);
  return c;
}

PrefillParams gpu_params(const Problem& problem) {
  PrefillParams p = problem.params;
  p.backend = BLASST_BACKEND_CUDA_SM90;
  p.threads = 0;
  int64_t rows = 0, most_rows = 0, most_keys = 0;
  for (const Lengths& r : problem.description.requests) {
    rows += r.queries;
    most_rows = std::max(most_rows, r.queries);
    most_keys = std::max(most_keys, r.keys);
  }
  if (p.cu_seqlens_q) p.query_length = most_rows, p.rows = rows;
  if (p.kv.cu_seqlens || p.kv.page_table) p.kv.key_length = most_keys;
  return p;
}

void run_on_gpu(Problem& problem, int repeats) {
  problem.mark_outputs();
  PrefillParams p = gpu_params(problem);
  const auto batch = static_cast<size_t>(p.batch), heads = static_cast<size_t>(p.heads);
  Arena arena;
  p.q = arena.copy(p.q, 2);
  p.out = arena.copy(p.out, 2);
  p.kv.k = arena.copy(p.kv.k, 2);
  p.kv.v = arena.copy(p.kv.v, 2);
  p.cu_seqlens_q = arena.copy(p.cu_seqlens_q, batch + 1);
  p.kv.cu_seqlens = arena.copy(p.kv.cu_seqlens, batch + 1);
  p.kv.lengths = arena.copy(p.kv.lengths, batch);
  p.kv.page_table = arena.copy(p.kv.page_table, problem.page_table.size());
  p.test.values = arena.copy(p.test.values, problem.thresholds.size());
  p.sinks = arena.copy(p.sinks, heads);
  p.mask.bands = arena.copy(p.mask.bands, 2 * heads);
  p.report.tile_maxima = problem.params.report.tile_maxima = nullptr;
  p.report.lse = arena.copy(problem.lse);
  p.report.dropped_mass_bound = arena.copy(problem.dropped_mass_bound);
  p.report.tiles_visitable = arena.copy(problem.tiles_visitable);
  p.report.tiles_skipped = arena.copy(problem.tiles_skipped);
  const bool decode = problem.description.decode;
  const TileShape shape = tile_shape(p, decode);
  const auto words_of = [&](int64_t keys) {
    return ((keys + shape.keys - 1) / shape.keys + 31) / 32;
  };
  int64_t query_tiles = 0, most_keys = 0;
  for (const Lengths& r : problem.description.requests) {
    query_tiles += (r.queries + shape.query_rows - 1) / shape.query_rows;
    most_keys = std::max(most_keys, r.keys);
  }
  const int64_t words = words_of(p.kv.key_length);
  std::vector<uint32_t> bits((decode ? p.kv_heads * p.batch : p.heads * query_tiles) * words,
                             0xffffffff);
  p.report.tile_bits = arena.copy(bits.data(), bits.size());
  p.report.gap_histogram = arena.copy(problem.gap_histogram);
  p.workspace_bytes = 0;
  p.workspace = nullptr;
  p.workspace_bytes = workspace_bytes(p, decode);
  p.workspace = arena.allocate<std::byte>(p.workspace_bytes);
  for (int i = 0; i < repeats; ++i) call(p, decode);
  must(cudaDeviceSynchronize());
  must(cudaMemcpy(problem.params.out.data, p.out.data, static_cast<size_t>(p.out.elements) * 2,
                  cudaMemcpyDeviceToHost));
  download(problem.lse, p.report.lse);
  download(problem.dropped_mass_bound, p.report.dropped_mass_bound);
  download(problem.tiles_visitable, p.report.tiles_visitable);
  download(problem.tiles_skipped, p.report.tiles_skipped);
  // The caller's words are of the longest request's keys, the GPU's of key_length.
  download(bits, p.report.tile_bits);
  problem.tile_bits.clear();
  for (size_t i = 0; i < bits.size(); ++i) {
    if (static_cast<int64_t>(i) % words < words_of(most_keys))
      problem.tile_bits.push_back(bits[i]);
    else if (bits[i] != 0)
      throw Error(BLASST_INTERNAL, "a tile behind the last key is kept");
  }
  problem.params.report.tile_bits = problem.tile_bits.data();
  download(problem.gap_histogram, p.report.gap_histogram);
}

}  // namespace blasst::check
