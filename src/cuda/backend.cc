#include "cuda/backend.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <string>
#include <string_view>
#include <utility>

#include "attention/checks.h"
#include "cuda/checks.h"
#include "cuda/merge.h"
#include "cuda/pages.h"
#include "cuda/sm90/decode/plan.h"
#include "cuda/sm90/prefill/plan.h"
#include "cuda/sm90/runtime.h"
#include "cuda/usable.h"

namespace blasst::cuda {
namespace {

Machine this_machine() {
  Machine m;
  m.runtime = CUDART_VERSION;
  cudaDriverGetVersion(&m.driver);
  if (const cudaError_t status = cudaGetDeviceCount(&m.devices); status != cudaSuccess) {
    m.error = cudaGetErrorString(status);
    return m;
  }
  cudaGetDevice(&m.device);
  cudaDeviceGetAttribute(&m.major, cudaDevAttrComputeCapabilityMajor, m.device);
  cudaDeviceGetAttribute(&m.minor, cudaDevAttrComputeCapabilityMinor, m.device);
  return m;
}

void check_usable() {
  if (const std::string why = obstacle(this_machine()); !why.empty())
    throw Error(BLASST_UNSUPPORTED, "cuda-sm90 is not usable: " + why);
}

// A kernel that touches memory of another kind ends the process's use of the device.
void check_memory(std::string_view name, const void* data) {
  if (!data) return;
  cudaPointerAttributes memory;
  check(cudaPointerGetAttributes(&memory, data), "cudaPointerGetAttributes");
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const bool here = memory.type == cudaMemoryTypeManaged ||
                    (memory.type == cudaMemoryTypeDevice && memory.device == device);
  if (here) return;
  const std::string where = memory.type == cudaMemoryTypeDevice
                                ? fmt::format("on device {}", memory.device)
                                : std::string("host memory");
  attention::fail("{} is {}; it must be memory of the current device, {}", name, where, device);
}

template <typename Call>
void check_device(const Call& call) {
  check_usable();
  check_memory("q.data", call.q.data);
  check_memory("out.data", call.out.data);
  check_memory("k.data", call.kv.k.data);
  check_memory("v.data", call.kv.v.data);
  check_memory("workspace", call.workspace);
}

}  // namespace

void run(const PrefillParams& params) {
  const prefill::Launch launch = prefill::plan(params);
  check_device(params);
  prefill::launch(launch);
}

std::size_t workspace_bytes(const PrefillParams& params) {
  return prefill::workspace_bytes(params);
}

TileShape tile_shape(const PrefillParams& params) { return prefill::tile_shape(params); }

void run(const DecodeParams& params) {
  const decode::Launch launch = decode::plan(params);
  check_device(params);
  decode::launch(launch);
}

std::size_t workspace_bytes(const DecodeParams& params) { return decode::workspace_bytes(params); }

TileShape tile_shape(const DecodeParams& params) { return decode::tile_shape(params); }

void merge(const MergeParams& params) {
  attention::check_merge(params);
  if (params.dtype == BLASST_FLOAT32) refuse("dtype is float32; it does bfloat16 and float16");
  if (params.threads != 0) refuse("threads is {}; it must be 0", params.threads);
  const std::pair<std::string_view, const View*> views[] = {
      {"out_a", &params.out_a}, {"out_b", &params.out_b}, {"out", &params.out}};
  for (const auto& [name, view] : views) check_aligned(name, *view);
  if (params.batch * params.query_length * params.heads > attention::kMaxCount)
    refuse("merge of {} rows of {} heads; it does {} rows times heads at most",
           params.batch * params.query_length, params.heads, attention::kMaxCount);
  check_usable();
  for (const auto& [name, view] : views) check_memory(name, view->data);
  launch_merge(params);
}

void check_pages(const KeysValues& kv, int64_t batch, int32_t* found, void* stream) {
  const PageCheck check = plan_page_check(kv, batch, found, stream);
  check_usable();
  launch_page_check(check);
}

BackendInfo info() {
  std::string why = obstacle(this_machine());
  if (!why.empty()) return {BLASST_BACKEND_CUDA_SM90, "cuda-sm90", false, why};
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device);
  return {BLASST_BACKEND_CUDA_SM90, "cuda-sm90", true,
          fmt::format("{}, {} multiprocessors", properties.name, properties.multiProcessorCount)};
}

}  // namespace blasst::cuda
