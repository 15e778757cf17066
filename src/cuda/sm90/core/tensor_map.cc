#include "cuda/sm90/core/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "blasst/blasst.hpp"
#include "cuda/core/runtime.h"

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

CUtensorMap tensor_map(const Tensor& tensor, Element element, const std::array<Dimension, 3>& outer,
                       CUtensorMapL2promotion promotion) {
  constexpr int kPanel = 64;
  cuuint64_t size[4] = {static_cast<cuuint64_t>(tensor.dim)}, strides[3];
  cuuint32_t box[4] = {kPanel};
  for (int i = 0; i < 3; ++i) {
    // A dimension without elements is never read, but a map needs one.
    size[i + 1] = static_cast<cuuint64_t>(std::max<int64_t>(1, outer[i].size));
    strides[i] = static_cast<cuuint64_t>(
        outer[i].size > 1 ? outer[i].stride * 2 : tensor.dim * 2);  // of no use where size is 1
    box[i + 1] = static_cast<cuuint32_t>(outer[i].box);
  }
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode_tiled()(
      &map,
      element == Element::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(tensor.data), size, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail("cuTensorMapEncodeTiled refused a tensor: CUresult " + std::to_string(status));
  return map;
}

}  // namespace blasst::cuda
