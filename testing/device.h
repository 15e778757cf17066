// The same problems on a GPU, through the library's interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "testing/backward.h"
#include "testing/compare.h"
#include "testing/problem.h"

namespace blasst::check {

// Elements of a query or key, and of a value.
struct HeadSizes {
  int64_t qk, value;
  bool operator==(const HeadSizes&) const = default;
};

// Those that some backend has kernels of.
inline constexpr HeadSizes kHeadSizes[] = {{64, 64},   {96, 64},   {96, 96},
                                           {128, 128}, {192, 128}, {256, 256}};

// Those of decode over latents.
inline constexpr HeadSizes kLatentSizes = {576, 512};

// What the library runs here on a GPU (BLASST_CUDA_BACKEND may choose).
struct GpuKernels {
  bool backward, int8_scores;
  bool latents, caches_in_8_bits;  // in decode
  std::vector<HeadSizes> prefill_sizes, decode_sizes;

  // Query rows that decide together in decode, at most, with head size 256: by shared memory.
  int64_t rows_of_256;

  const std::vector<HeadSizes>& sizes(bool decode) const {
    return decode ? decode_sizes : prefill_sizes;
  }
  int64_t most_rows(int64_t qk_dim) const { return qk_dim == 256 ? rows_of_256 : 64; }
};
const GpuKernels& gpu_kernels();

// Those of cuda-sm80, on a card with room for so many rows.
GpuKernels portable_kernels(int64_t rows_of_256);

// A problem like `c` that the GPU takes: its types, dimensions, pages, strides, query rows.
Case for_gpu(Case c);

// The same of these kernels. Needs no GPU.
Case for_kernels(Case c, const GpuKernels& kernels);

// The same of case `c` as one that has a backward there.
Case differentiable_on_gpu(Case c);

// Parameters of the problem as the GPU is called with, host pointers still.
AttentionParams gpu_params(const Problem& problem);

// Memory of the current device. Throws Error, as does everything here.
class DeviceMemory {
 public:
  void* allocate(size_t bytes);

  // A copy of a host array; null stays null.
  template <typename T>
  T* copy(const T* host, size_t count) {
    if (!host) return nullptr;
    auto* device = static_cast<T*>(allocate(count * sizeof(T)));
    write(device, host, count * sizeof(T));
    return device;
  }
  View copy(View view);

  static void write(void* device, const void* host, size_t bytes);
  static void read(void* host, const void* device, size_t bytes);

 private:
  struct Free {
    void operator()(void* data) const;
  };
  std::vector<std::unique_ptr<void, Free>> buffers_;
};

// What a call on the device reports.
enum class Reports {
  kNone,
  kCounts,  // LSE and statistics
  kAll,
};

// A problem's copy on the current device.
class DeviceProblem {
 public:
  explicit DeviceProblem(Problem& problem, Reports reports = Reports::kAll);

  AttentionParams params;  // pointers into the device; a test may change what it wants

  void mark();      // fills the outputs with marks
  void launch();    // calls the library
  void download();  // waits for the device and copies the outputs into the problem
  void run() { mark(), launch(), download(); }

  // Overwrites an input with a host array of its size.
  template <typename T>
  static void put(const T* device, const std::vector<T>& host) {
    DeviceMemory::write(const_cast<T*>(device), host.data(), host.size() * sizeof(T));
  }

 private:
  Problem& problem_;
  DeviceMemory memory_;
};

// The same of a backward, whose forward has run on the GPU.
class DeviceBackward {
 public:
  explicit DeviceBackward(BackwardProblem& problem);

  BackwardParams params;  // pointers into the device; a test may change what it wants

  void mark();
  void launch();
  void download();
  void run() { mark(), launch(), download(); }

 private:
  BackwardProblem& problem_;
  DeviceMemory memory_;
};

// What the problem is on the GPU.
Plan gpu_plan(const Problem& problem);

// What a call on the GPU wrote with the reference, with the GPU's plan and roundings.
Comparison compare_on_gpu(const Problem& problem);

void synchronize();  // waits for the current device

}  // namespace blasst::check
