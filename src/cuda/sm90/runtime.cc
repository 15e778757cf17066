#include "cuda/sm90/runtime.h"

#include <algorithm>
#include <string>
#include <vector>

#include "blasst/blasst.hpp"

namespace blasst::cuda {
namespace {

[[noreturn]] void fail(const std::string& what) { throw Error(BLASST_INTERNAL, what); }

// CMakeLists.txt asks for as much: cudaGetDriverEntryPointByVersion.
static_assert(CUDART_VERSION >= 12050);

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      fail("the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or later is needed");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return encode;
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (forgotten(status) != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(status));
}

cudaError_t forgotten(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

void clear(void* data, std::size_t bytes, cudaStream_t stream) {
  if (data && bytes > 0) check(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
}

int multiprocessors() {
  int device, count;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

void enqueue(const void* kernel, int blocks, int threads, int shared_bytes, cudaStream_t stream,
             std::initializer_list<const void*> arguments) {
  std::vector<void*> addresses;
  for (const void* argument : arguments) addresses.push_back(const_cast<void*>(argument));
  check(
      cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), addresses.data(), shared_bytes, stream),
      "cudaLaunchKernel");
}

void allow_shared_memory(const void* kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
}

CUtensorMap tensor_map(const void* data, Element element, int dim,
                       const std::array<Dimension, 3>& outer, CUtensorMapL2promotion promotion) {
  constexpr int kPanel = 64;
  cuuint64_t size[4] = {static_cast<cuuint64_t>(dim)}, strides[3];
  cuuint32_t box[4] = {kPanel};
  for (int i = 0; i < 3; ++i) {
    // A dimension without elements is never read, but a map needs one.
    size[i + 1] = static_cast<cuuint64_t>(std::max<int64_t>(1, outer[i].size));
    strides[i] = static_cast<cuuint64_t>(outer[i].size > 1 ? outer[i].stride * 2
                                                           : dim * 2);  // of no use where size is 1
    box[i + 1] = static_cast<cuuint32_t>(outer[i].box);
  }
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode_tiled()(
      &map,
      element == Element::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(data), size, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail("cuTensorMapEncodeTiled refused a tensor: CUresult " + std::to_string(status));
  return map;
}

}  // namespace blasst::cuda
