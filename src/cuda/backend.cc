#include "cuda/backend.h"

#include <cuda_runtime_api.h>

#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "cuda/core/checks.h"
#include "cuda/core/plan.h"
#include "cuda/core/prefill/widen.h"
#include "cuda/core/runtime.h"
#include "cuda/merge.h"
#include "cuda/pages.h"
#include "cuda/sm80/decode/launch.h"
#include "cuda/sm80/decode/plan.h"
#include "cuda/sm80/prefill/launch.h"
#include "cuda/sm80/prefill/plan.h"
#include "cuda/sm90/backward/plan.h"
#include "cuda/sm90/decode/launch.h"
#include "cuda/sm90/decode/plan.h"
#include "cuda/sm90/prefill/plan.h"
#include "cuda/usable.h"
#include "problem/checks.h"
#include "problem/element.h"
#include "problem/text.h"

namespace blasst::cuda {
namespace {

using problem::Phase;

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

// What there is machine code for.
constexpr int kHopperCodes[] = {90};
constexpr int kPortableCodes[] = {BLASST_CUDA_CODES};

void check_usable(std::string_view name, const Capabilities& kernels, std::span<const int> codes) {
  if (const std::string why = obstacle(this_machine(), kernels, codes); !why.empty())
    refuse(name, "it is not usable: {}", why);
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
                                  ? formatted("on device {}", memory.device)
                                  : std::string("host memory");
    problem::fail("{} is {}; it must be memory of the current device, {}", name, where, device_);
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

void check_memory(const blasst_problem& p, const MemoryCheck& check_array) {
  check_array("q.data", p.q.data);
  check_array("out.data", p.out.data);
  check_memory(p.kv, check_array);
  check_array("cu_seqlens_q", p.cu_seqlens_q);
  check_array("query_lengths", p.query_lengths);
  check_array("sinks", p.sinks);
  check_array("k_scales.values", p.k_scales.values);
  check_array("v_scales.values", p.v_scales.values);
  check_array("mask.bands", p.mask.bands);
}

void check_memory(const Gradients& g, const MemoryCheck& check_array) {
  check_array("dout.data", g.dout.data);
  check_array("lse", g.lse);
  check_array("dlse", g.dlse);
  check_array("tile_bits", g.tile_bits);
  check_array("dq.data", g.dq.data);
  check_array("dk.data", g.dk.data);
  check_array("dv.data", g.dv.data);
  check_array("dsinks", g.dsinks);
}

void check_memory(const BackwardParams& params) {
  const MemoryCheck check_array;
  check_memory(params.problem, check_array);
  check_memory(params.gradients, check_array);
  check_array("workspace", params.execution.workspace);
}

void check_memory(const AttentionParams& params) {
  const MemoryCheck check_array;
  check_memory(params.problem, check_array);
  check_array("test.values", params.decision.test.values);
  check_memory(params.report, check_array);
  check_array("workspace", params.execution.workspace);
}

// What the backends have in common: the device, and what is done to outputs.
class Cuda : public api::Backend {
 public:
  Cuda(blasst_backend id, const char* architecture, const Capabilities& kernels,
       std::span<const int> codes)
      : id_(id), architecture_(architecture), kernels_(kernels), codes_(codes) {}

  blasst_backend id() const override { return id_; }

  BackendInfo info() const override {
    BackendInfo info{id(), name(), architecture_, false, obstacle()};
    if (!info.detail.empty()) return info;
    int device = 0;
    cudaDeviceProp properties;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    info.usable = true;
    info.detail =
        formatted("{}, {} multiprocessors", properties.name, properties.multiProcessorCount);
    return info;
  }

  std::string obstacle(api::Memory memory) const override {
    if (!memory.gpu) return "the tensors are in host memory";
    return obstacle();
  }

  void merge(const MergeParams& params) const override {
    problem::check_merge(params);
    const std::pair<std::string_view, const View*> views[] = {
        {"out_a", &params.out_a}, {"out_b", &params.out_b}, {"out", &params.out}};
    for (const auto& [view_name, view] : views) {
      if (view->dtype != params.out.dtype)
        refuse(name(), "{} is {} and out {}; it does tensors of one type", view_name,
               problem::dtype_name(view->dtype), problem::dtype_name(params.out.dtype));
      if (view->dtype == BLASST_FLOAT32)
        refuse(name(), "{} is float32; it does bfloat16 and float16", view_name);
      check_aligned(name(), view_name, *view);
    }
    if (params.execution.threads != 0)
      refuse(name(), "threads is {}; it must be 0", params.execution.threads);
    if (params.batch * params.query_length * params.heads > problem::kMaxCount)
      refuse(name(), "merge of {} rows of {} heads; it does {} rows times heads at most",
             params.batch * params.query_length, params.heads, problem::kMaxCount);
    check_usable(name(), kernels_, codes_);
    const MemoryCheck check_array;
    for (const auto& [view_name, view] : views) check_array(view_name, view->data);
    check_array("lse_a", params.lse_a);
    check_array("lse_b", params.lse_b);
    check_array("lse", params.lse);
    launch_merge(params);
  }

 protected:
  std::string name() const { return std::string("cuda-") + architecture_; }

  // Prefill's plan, and a launch, by functions that know no 8 bits.
  template <typename PlanCall>
  Plan plan_prefill(const AttentionParams& params, const PlanCall& plan_call) const {
    if (!prefill::needs_widening(params)) return plan_call(params);
    const prefill::Widening widening = prefill::plan_widening(name(), params);
    Plan plan = plan_call(widening.params);
    plan.workspace_bytes += widening.bytes;
    return plan;
  }
  template <typename PlanCall, typename PlanLaunch, typename Launch>
  void run_prefill(const AttentionParams& params, const PlanCall& plan_call,
                   const PlanLaunch& plan_launch, const Launch& launch) const {
    if (!prefill::needs_widening(params)) {
      const prefill::Launch planned = plan_launch(params);
      check_device(params);
      return launch(planned);
    }
    const std::size_t needed = plan_prefill(params, plan_call).workspace_bytes;
    prefill::check_widening(name(), params);
    check_workspace(name(), params.execution, needed, 256);
    const prefill::Widening widening = prefill::plan_widening(name(), params);
    const prefill::Launch planned = plan_launch(widening.params);
    check_device(params);
    prefill::widen(widening);
    launch(planned);
  }

  std::string obstacle() const { return cuda::obstacle(this_machine(), kernels_, codes_); }
  bool usable() const { return obstacle().empty(); }

  template <typename CallParams>
  void check_device(const CallParams& params) const {
    check_usable(name(), kernels_, codes_);
    check_memory(params);
  }

 private:
  const blasst_backend id_;
  const char* const architecture_;
  const Capabilities kernels_;
  const std::span<const int> codes_;
};

class Sm90 : public Cuda {
 public:
  Sm90() : Cuda(BLASST_BACKEND_CUDA_SM90, "sm90", kSm90, kHopperCodes) {}

  Plan plan(const AttentionParams& params, Phase phase) const override {
    if (phase == Phase::kDecode) return decode::plan(params);
    return plan_prefill(params, prefill::plan);
  }

  Plan plan(const BackwardParams& params) const override { return backward::plan(params); }

  void run(const AttentionParams& params, Phase phase) const override {
    if (phase == Phase::kDecode) {
      const decode::Launch launch = decode::plan_launch(params);
      check_device(params);
      decode::launch(launch);
    } else {
      run_prefill(params, prefill::plan, prefill::plan_launch, prefill::launch);
    }
  }

  void run(const BackwardParams& params) const override {
    const backward::Launch launch = backward::plan_launch(params);
    check_device(params);
    backward::launch(launch);
  }
};

class Sm80 : public Cuda {
 public:
  Sm80() : Cuda(BLASST_BACKEND_CUDA_SM80, "sm80", kSm80, kPortableCodes) {}

  Plan plan(const AttentionParams& params, Phase phase) const override {
    if (phase == Phase::kPrefill) return plan_prefill(params, prefill::sm80::plan);
    const Plan plan = decode::sm80::plan(params);
    // What the device has no room for is refused before its memory is given away.
    if (usable()) decode::sm80::check_room(params.problem, decode::sm80::shared_memory());
    return plan;
  }

  Plan plan(const BackwardParams&) const override { refuse_backward(); }

  void run(const AttentionParams& params, Phase phase) const override {
    if (phase == Phase::kDecode) {
      const decode::Launch launch = decode::sm80::plan_launch(params);
      check_device(params);
      decode::sm80::launch(launch);
    } else {
      run_prefill(params, prefill::sm80::plan, prefill::sm80::plan_launch, prefill::sm80::launch);
    }
  }

  void run(const BackwardParams&) const override { refuse_backward(); }

 private:
  [[noreturn]] static void refuse_backward() {
    refuse(kCudaSm80, "it has no backward; it does prefill and decode");
  }
};

}  // namespace

const api::Backend& sm90_backend() {
  static const Sm90 backend;
  return backend;
}

const api::Backend& sm80_backend() {
  static const Sm80 backend;
  return backend;
}

api::Memory memory_of(const void* data) {
  cudaPointerAttributes memory{};
  // No driver, or no device: then there is no memory of one.
  if (!data || forgotten(cudaPointerGetAttributes(&memory, data)) != cudaSuccess) return {};
  const bool device = memory.type == cudaMemoryTypeDevice;
  return {.host = !device, .gpu = device || memory.type == cudaMemoryTypeManaged};
}

void check_pages(const blasst_problem& problem, int32_t* found, void* stream) {
  const PageCheck call = plan_page_check(problem, found, stream);
  check_usable(kCudaSm80, kSm80, kPortableCodes);
  const MemoryCheck check_array;
  check_array("kv.page_table", problem.kv.page_table);
  check_array("kv.lengths", problem.kv.lengths);
  check_array("found", found);
  launch_page_check(call);
}

}  // namespace blasst::cuda
