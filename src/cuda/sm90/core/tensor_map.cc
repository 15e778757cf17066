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

// Elements of a panel.
int panel_of(const Tensor& tensor, Element element) {
  return static_cast<int>(std::min<int64_t>(tensor.dim, 128 / bytes_of(element)));
}

// dimensions: from the innermost on, whose stride is 1.
template <std::size_t kRank>
CUtensorMap encode(const Tensor& tensor, Element element,
                   const std::array<Dimension, kRank>& dimensions,
                   CUtensorMapL2promotion promotion) {
  const int bytes = bytes_of(element);
  cuuint64_t size[kRank], strides[kRank];
  cuuint32_t box[kRank], steps[kRank];
  for (std::size_t i = 0; i < kRank; ++i) {
    const Dimension& d = dimensions[i];
    // A dimension without elements is never read, but a map needs one.
    size[i] = static_cast<cuuint64_t>(std::max<int64_t>(1, d.size));
    // Of no use where size is 1.
    strides[i] = static_cast<cuuint64_t>(bytes * (d.size > 1 ? d.stride : tensor.dim));
    box[i] = static_cast<cuuint32_t>(d.box);
    steps[i] = 1;
  }
  const CUtensorMapDataType type = element == Element::kInt8   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : element == Element::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle swizzle = panel_of(tensor, element) * bytes == 128
                                         ? CU_TENSOR_MAP_SWIZZLE_128B
                                         : CU_TENSOR_MAP_SWIZZLE_64B;
  CUtensorMap map;
  const auto encoded = [&] {
    return encode_tiled()(&map, type, kRank, const_cast<void*>(tensor.data), size, strides + 1, box,
                          steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encoded();
  // A thread has no context before its first call of the runtime's that needs one: one of
  // autograd's, when a backward is its first work.
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    take_context();
    status = encoded();
  }
  if (status != CUDA_SUCCESS)
    fail("cuTensorMapEncodeTiled refused a tensor: CUresult " + std::to_string(status));
  return map;
}

}  // namespace

CUtensorMap tensor_map(const Tensor& tensor, Element element, const std::array<Dimension, 3>& outer,
                       CUtensorMapL2promotion promotion) {
  const Dimension row{tensor.dim, 1, panel_of(tensor, element)};
  return encode<4>(tensor, element, {row, outer[0], outer[1], outer[2]}, promotion);
}

CUtensorMap panels_map(const Tensor& tensor, Element element, const std::array<Dimension, 3>& outer,
                       int panels, CUtensorMapL2promotion promotion) {
  const int panel = panel_of(tensor, element);
  return encode<5>(tensor, element,
                   {Dimension{panel, 1, panel}, outer[0], outer[1],
                    Dimension{tensor.dim / panel, panel, panels}, outer[2]},
                   promotion);
}

}  // namespace blasst::cuda
