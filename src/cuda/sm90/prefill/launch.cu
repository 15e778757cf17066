#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "blasst/blasst.hpp"
#include "cuda/sm90/prefill/kernels.h"
#include "cuda/sm90/prefill/launch.h"
#include "cuda/sm90/prefill/layout.cuh"
#include "cuda/sm90/prefill/schedule.h"

namespace blasst::cuda::prefill {
namespace {

// Of the L2's 50 to 60 MB, what the keys and values of one section may take.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

[[noreturn]] void fail(const std::string& what) { throw Error(BLASST_INTERNAL, what); }

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(status));
}

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

// Boxes of `rows` tokens by one panel, swizzled.
CUtensorMap tensor_map(const Tensor& t, Element element, int dim, int rows) {
  const auto bytes = [&](int64_t stride, int64_t size) {
    return static_cast<cuuint64_t>(size > 1 ? stride * 2 : dim * 2);  // of no use where size is 1
  };
  const cuuint64_t size[] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(t.tokens),
                             static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.outer)};
  const cuuint64_t strides[] = {bytes(t.stride_token, t.tokens), bytes(t.stride_head, t.heads),
                                bytes(t.stride_outer, t.outer)};
  const cuuint32_t box[] = {kPanel, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode_tiled()(&map,
                     element == Element::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                     4, const_cast<void*>(t.data), size, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail("cuTensorMapEncodeTiled refused a tensor: CUresult " + std::to_string(status));
  return map;
}

}  // namespace

void launch(const Launch& l) {
  Params p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const auto clear = [stream](void* data, std::size_t bytes) {
    if (data && bytes > 0) check(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
  };
  const std::size_t heads = static_cast<std::size_t>(p.heads);
  clear(p.visitable, p.batch * heads * sizeof(*p.visitable));
  clear(p.skipped, p.batch * heads * sizeof(*p.skipped));
  clear(p.gap_histogram, heads * BLASST_GAP_BINS * sizeof(*p.gap_histogram));
  p.row_blocks = (p.query_length + kRowsPerBlock - 1) / kRowsPerBlock;
  p.items = p.batch * p.heads * p.row_blocks;
  if (p.items == 0 || p.rows == 0) return;
  p.section_heads = section_heads(p.key_length, l.dim, p.batch, p.heads, p.kv_heads, kSectionBytes);
  p.next_item = l.workspace;

  const int keys = tile_keys(l.dim);
  const int key_rows = p.page_table ? std::min(p.page_size, keys) : keys;
  const CUtensorMap q = tensor_map(l.q, l.element, l.dim, kRowsPerWarpgroup);
  // Without keys nothing is copied; any tensor will do.
  const bool keys_at_all = p.key_length > 0 && l.k.tokens > 0 && l.k.outer > 0;
  const CUtensorMap k = tensor_map(keys_at_all ? l.k : l.q, l.element, l.dim, key_rows);
  const CUtensorMap v = tensor_map(keys_at_all ? l.v : l.q, l.element, l.dim, key_rows);

  int device, multiprocessors;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  clear(p.next_item, sizeof(int));
  const Kernel kernel = find_kernel(l.element, l.dim, l.variant);
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kernel.shared_bytes),
        "cudaFuncSetAttribute");
  void* arguments[] = {&p, const_cast<CUtensorMap*>(&q), const_cast<CUtensorMap*>(&k),
                       const_cast<CUtensorMap*>(&v)};
  check(cudaLaunchKernel(kernel.function, dim3(std::min(p.items, multiprocessors)), dim3(kThreads),
                         arguments, kernel.shared_bytes, stream),
        "cudaLaunchKernel");
}

}  // namespace blasst::cuda::prefill
