// What tests on a GPU share.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "blasst/blasst.hpp"
#include "testing/device.h"

namespace blasst::check {

inline void must(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Skipped where there is no GPU that the kernels run on.
class OnGpu : public testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    for (const BackendInfo& backend : backends()) {
      if (backend.backend == BLASST_BACKEND_CPU) continue;
      if (backend.usable) return;
      why += backend.name + ": " + backend.detail + "; ";
    }
    GTEST_SKIP() << why;
  }
};

// Skipped also where the backend under test has no kernel of these sizes.
class SizesOnGpu : public OnGpu, public testing::WithParamInterface<HeadSizes> {
 protected:
  explicit SizesOnGpu(bool decode) : decode_(decode) {}
  void SetUp() override {
    OnGpu::SetUp();
    if (!IsSkipped() && !std::ranges::count(gpu_kernels().sizes(decode_), GetParam()))
      GTEST_SKIP() << "no kernels of these sizes";
  }

 private:
  const bool decode_;
};

inline std::string name_of_sizes(const testing::TestParamInfo<HeadSizes>& info) {
  return std::to_string(info.param.qk) + "_" + std::to_string(info.param.value);
}

// Runs a problem on the GPU and holds what it wrote against the reference.
inline Comparison run_and_compare(Problem& problem) {
  DeviceProblem(problem).run();
  return compare_on_gpu(problem);
}

// What a call enqueues on a stream, captured.
class Graph {
 public:
  template <typename Call>
  explicit Graph(const Call& call) {
    must(cudaStreamCreate(&stream_));
    must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    call(stream_);
    must(cudaStreamEndCapture(stream_, &graph_));
    must(cudaGraphInstantiate(&replay_, graph_, 0));
  }
  Graph(const Graph&) = delete;
  ~Graph() {
    cudaGraphExecDestroy(replay_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  void replay() {
    must(cudaGraphLaunch(replay_, stream_));
    must(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_;
  cudaGraphExec_t replay_;
};

}  // namespace blasst::check
