#include "target.h"

#include <algorithm>
#include <span>

#include "measure.h"
#include "testing/compare.h"
#include "testing/element.h"
#if BLASST_CUDA
#include <cuda_runtime_api.h>

#include "testing/device.h"
#endif

namespace blasst::command {
namespace {

size_t bytes_of(const View& view) {
  return static_cast<size_t>(view.elements * check::element_bytes(view.dtype));
}

class OnCpu : public Target {
 public:
  explicit OnCpu(check::Problem& problem) : problem_(problem) { params = problem.params; }

  void run() override {
    problem_.mark_outputs();
    check::call(params, problem_.description.decode);
  }
  void finish() override {}

  size_t move_keys_and_values(int threads) override {
    const auto bytes = [&](const View& view) {
      return std::span(static_cast<const std::byte*>(view.data), bytes_of(view));
    };
    const std::span<const std::byte> caches[] = {bytes(params.problem.kv.k),
                                                 bytes(params.problem.kv.v)};
    sink_ = read_all(caches, threads);
    return caches[0].size() + caches[1].size();
  }

 private:
  check::Problem& problem_;
  volatile unsigned long long sink_ = 0;
};

class BackwardOnCpu : public BackwardTarget {
 public:
  BackwardOnCpu(check::Problem& forward, bool with_bits) {
    forward.run();
    problem = std::make_unique<check::BackwardProblem>(forward);
    if (!with_bits) problem->params.gradients.tile_bits = nullptr;
  }

  void run() override { problem->run(); }
  void call() override { backward(problem->params); }
  void finish() override {}
};

#if BLASST_CUDA
class BackwardOnGpu : public BackwardTarget {
 public:
  BackwardOnGpu(check::Problem& forward, bool with_bits) {
    check::DeviceProblem(forward).run();
    problem = std::make_unique<check::BackwardProblem>(forward);
    problem->params.execution = {.backend = BLASST_BACKEND_CUDA};
    if (!with_bits) problem->params.gradients.tile_bits = nullptr;
    device_ = std::make_unique<check::DeviceBackward>(*problem);
  }

  void run() override { device_->run(); }
  void call() override { device_->launch(); }
  void finish() override { check::synchronize(); }

 private:
  std::unique_ptr<check::DeviceBackward> device_;
};

class OnGpu : public Target {
 public:
  OnGpu(check::Problem& problem, bool everything)
      : device_(problem, everything ? check::Reports::kAll : check::Reports::kCounts) {
    params = device_.params;
  }

  void run() override {
    device_.params = params;
    device_.run();
  }
  void finish() override { check::synchronize(); }

  size_t move_keys_and_values(int) override {
    size_t moved = 0;
    const View &k = params.problem.kv.k, &v = params.problem.kv.v;
    if (!copy_) copy_ = memory_.allocate(std::max(bytes_of(k), bytes_of(v)));
    for (const View& view : {k, v}) {
      const size_t bytes = bytes_of(view);
      if (const cudaError_t status =
              cudaMemcpyAsync(copy_, view.data, bytes, cudaMemcpyDeviceToDevice);
          status != cudaSuccess)
        throw Error(BLASST_INTERNAL, cudaGetErrorString(status));
      moved += 2 * bytes;
    }
    return moved;
  }

 private:
  check::DeviceProblem device_;
  check::DeviceMemory memory_;
  void* copy_ = nullptr;
};
#endif

}  // namespace

std::unique_ptr<Target> make_target(check::Problem& problem, Backend backend,
                                    [[maybe_unused]] bool everything) {
#if BLASST_CUDA
  if (backend == BLASST_BACKEND_CUDA) return std::make_unique<OnGpu>(problem, everything);
#endif
  problem.params.execution.backend = backend;
  return std::make_unique<OnCpu>(problem);
}

std::unique_ptr<BackwardTarget> make_backward_target(check::Problem& forward, Backend backend,
                                                     bool with_bits) {
#if BLASST_CUDA
  if (backend == BLASST_BACKEND_CUDA) return std::make_unique<BackwardOnGpu>(forward, with_bits);
#endif
  forward.params.execution.backend = backend;
  return std::make_unique<BackwardOnCpu>(forward, with_bits);
}

check::Case case_for(check::Case c, [[maybe_unused]] Backend backend) {
#if BLASST_CUDA
  if (backend == BLASST_BACKEND_CUDA) return check::for_gpu(c);
#endif
  return c;
}

Plan plan_on(const check::Problem& problem, [[maybe_unused]] Backend backend) {
#if BLASST_CUDA
  if (backend == BLASST_BACKEND_CUDA) return check::gpu_plan(problem);
#endif
  return check::plan(problem.params, problem.description.decode);
}

check::Comparison compare_on(const check::Problem& problem, [[maybe_unused]] Backend backend) {
#if BLASST_CUDA
  if (backend == BLASST_BACKEND_CUDA) return check::compare_on_gpu(problem);
#endif
  return check::compare(problem);
}

std::string processor(Backend backend) {
  for (const BackendInfo& info : backends())
    if (info.usable && info.backend != BLASST_BACKEND_CPU && backend != BLASST_BACKEND_CPU)
      return info.detail;
  return cpu_isa();
}

}  // namespace blasst::command
