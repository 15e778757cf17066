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
  cudaError_t status = forgotten(cudaDriverGetVersion(&m.driver));
  const auto ask = [&](auto call, auto... arguments) {
    if (status == cudaSuccess) status = forgotten(call(arguments...));
  };
  ask(cudaGetDeviceCount, &m.devices);
  ask(cudaGetDevice, &m.device);
  ask(cudaDeviceGetAttribute, &m.major, cudaDevAttrComputeCapabilityMajor, m.device);
  ask(cudaDeviceGetAttribute, &m.minor, cudaDevAttrComputeCapabilityMinor, m.device);
  if (status != cudaSuccess) m.error = cudaGetErrorString(status);
  return m;
}

void check_usable() {
  if (const std::string why = obstacle(this_machine()); !why.empty())
    throw Error(BLASST_UNSUPPORTED, "cuda-sm90 is not usable: " + why);
}

// A kernel that touches memory of another kind ends the process's use of the device, so every array
// is looked at. That asks the driver's tables only: nothing is enqueued or captured.
class MemoryCheck {
 public:
  MemoryCheck() { check(cudaGetDevice(&device_), "cudaGetDevice"); }

  void operator()(std::string_view name, const void* data) const {
    if (!data) return;
    cudaPointerAttributes memory;
    check(cudaPointerGetAttributes(&memory, data), "cudaPointerGetAttributes");
    const bool here = memory.type == cudaMemoryTypeManaged ||
                      (memory.type == cudaMemoryTypeDevice && memory.device == device_);
    if (here) return;
    const std::string where = memory.type == cudaMemoryTypeDevice
                                  ? fmt::format("on device {}", memory.device)
                                  : std::string("host memory");
    attention::fail("{} is {}; it must be memory of the current device, {}", name, where, device_);
  }

 private:
  int device_ = 0;
};

void check_memory(const KeysValues& kv, const MemoryCheck& check_array) {
  check_array("k.data", kv.k.data);
  check_array("v.data", kv.v.data);
  check_array("kv.starts", kv.starts);
  check_array("kv.lengths", kv.lengths);
  check_array("kv.cu_seqlens", kv.cu_seqlens);
  check_array("kv.page_table", kv.page_table);
}

void check_memory(const Report& report, const MemoryCheck& check_array) {
  check_array("report.lse", report.lse);
  check_array("report.dropped_mass_bound", report.dropped_mass_bound);
  check_array("report.tiles_visitable", report.tiles_visitable);
  check_array("report.tiles_skipped", report.tiles_skipped);
  check_array("report.tile_bits", report.tile_bits);
  check_array("report.gap_histogram", report.gap_histogram);
  check_array("report.tile_maxima", report.tile_maxima);
}

template <typename Call>
void check_device(const Call& call) {
  check_usable();
  const MemoryCheck check_array;
  check_array("q.data", call.q.data);
  check_array("out.data", call.out.data);
  check_memory(call.kv, check_array);
  if constexpr (requires { call.cu_seqlens_q; }) {
    check_array("cu_seqlens_q", call.cu_seqlens_q);
    check_array("query_lengths", call.query_lengths);
  }
  check_array("sinks", call.sinks);
  check_array("mask.bands", call.mask.bands);
  check_array("test.values", call.test.values);
  check_memory(call.report, check_array);
  check_array("workspace", call.workspace);
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
  const MemoryCheck check_array;
  for (const auto& [name, view] : views) check_array(name, view->data);
  check_array("lse_a", params.lse_a);
  check_array("lse_b", params.lse_b);
  check_array("lse", params.lse);
  launch_merge(params);
}

void check_pages(const KeysValues& kv, int64_t batch, int32_t* found, void* stream) {
  const PageCheck call = plan_page_check(kv, batch, found, stream);
  check_usable();
  const MemoryCheck check_array;
  check_array("kv.page_table", kv.page_table);
  check_array("kv.lengths", kv.lengths);
  check_array("found", found);
  launch_page_check(call);
}

BackendInfo info() {
  std::string why = obstacle(this_machine());
  if (!why.empty()) return {BLASST_BACKEND_CUDA_SM90, "cuda-sm90", false, why};
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return {BLASST_BACKEND_CUDA_SM90, "cuda-sm90", true,
          fmt::format("{}, {} multiprocessors", properties.name, properties.multiProcessorCount)};
}

}  // namespace blasst::cuda
