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
  const int bytes = bytes_of(element);
  const auto panel = static_cast<int>(std::min<int64_t>(tensor.dim, 128 / bytes));
  cuuint64_t size[4] = {static_cast<cuuint64_t>(tensor.dim)}, strides[3];
  cuuint32_t box[4] = {static_cast<cuuint32_t>(panel)};
  for (int i = 0; i < 3; ++i) {
    // A dimension without elements is never read, but a map needs one.
    size[i + 1] = static_cast<cuuint64_t>(std::max<int64_t>(1, outer[i].size));
    // Of no use where size is 1.
    strides[i] =
        static_cast<cuuint64_t>(bytes * (outer[i].size > 1 ? outer[i].stride : tensor.dim));
    box[i + 1] = static_cast<cuuint32_t>(outer[i].box);
  }
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode_tiled()(
      &map,
      element == Element::kInt8   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
      : element == Element::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(tensor.data), size, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      panel * bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, promotion,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail("cuTensorMapEncodeTiled refused a tensor: CUresult " + std::to_string(status));
  return map;
}

}  // namespace blasst::cuda
