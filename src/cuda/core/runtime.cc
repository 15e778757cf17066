#include "cuda/core/runtime.h"

#include <algorithm>
#include <string>
#include <vector>

#include "blasst/blasst.hpp"

namespace blasst::cuda {

void check(cudaError_t status, const char* what) {
  if (forgotten(status) != cudaSuccess)
    throw Error(BLASST_INTERNAL, std::string(what) + ": " + cudaGetErrorString(status));
}

cudaError_t forgotten(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

void clear(void* data, std::size_t bytes, cudaStream_t stream) {
  if (data && bytes > 0) check(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
}

namespace {

int current_device() {
  int device;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

int attribute(cudaDeviceAttr which) {
  int value;
  check(cudaDeviceGetAttribute(&value, which, current_device()), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

void take_context() { check(cudaSetDevice(current_device()), "cudaSetDevice"); }

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int most_shared_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
int shared_memory_of_multiprocessor() {
  return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

int resident_blocks(const void* kernel, int threads, int shared_bytes) {
  int each;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return std::max(1, each) * multiprocessors();
}

void enqueue(const void* kernel, dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
             std::initializer_list<const void*> arguments) {
  std::vector<void*> addresses;
  for (const void* argument : arguments) addresses.push_back(const_cast<void*>(argument));
  check(cudaLaunchKernel(kernel, blocks, dim3(threads), addresses.data(), shared_bytes, stream),
        "cudaLaunchKernel");
}

void allow_shared_memory(const void* kernel, int bytes) {
  const int most = most_shared_memory();
  if (bytes > most)
    throw Error(BLASST_UNSUPPORTED,
                "cuda: the kernel for these head sizes takes " + std::to_string(bytes) +
                    " bytes of shared memory a block; device " + std::to_string(current_device()) +
                    " has " + std::to_string(most));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
}

}  // namespace blasst::cuda
