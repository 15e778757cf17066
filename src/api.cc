// The public C++ entry points: check the parameters, hand the problem to the backend.
#include <fmt/format.h>

#include "attention/checks.h"
#include "attention/float_environment.h"
#include "attention/problem.h"
#include "blasst/blasst.hpp"
#include "cpu/backend.h"
#include "cpu/plan.h"
#include "cpu/processors.h"
#if BLASST_CUDA
#include "cuda/backend.h"
#endif

namespace blasst {
namespace {

// Does with params what the backend they name does.
template <typename Params, typename Cpu, typename Cuda>
auto dispatch(const Params& params, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (params.backend == BLASST_BACKEND_CPU) return cpu();
#if BLASST_CUDA
  if (params.backend == BLASST_BACKEND_CUDA_SM90) return cuda();
  constexpr const char* built = "cpu (0), cuda-sm90 (1)";
#else
  constexpr const char* built = "cpu (0)";
#endif
  throw Error(BLASST_UNSUPPORTED, fmt::format("backend {} is not in this build; it has: {}",
                                              static_cast<int>(params.backend), built));
}

#if BLASST_CUDA
#define BLASST_ON_CUDA(call) [&] { return cuda::call; }
#else
#define BLASST_ON_CUDA(call) nullptr
#endif

// Gradients exist on the CPU.
const BackwardParams& on_cpu(const BackwardParams& params) {
  if (params.backend != BLASST_BACKEND_CPU)
    throw Error(BLASST_UNSUPPORTED, fmt::format("backend {} has no backward; it is on: cpu (0)",
                                                static_cast<int>(params.backend)));
  return params;
}

}  // namespace

void prefill(const PrefillParams& params) {
  const attention::DefaultFloatEnvironment environment;
  dispatch(
      params,
      [&] {
        cpu::prefill(attention::make_problem(params), cpu::threads_of(params.threads),
                     {params.workspace, params.workspace_bytes});
      },
      BLASST_ON_CUDA(run(params)));
}

void decode(const DecodeParams& params) {
  const attention::DefaultFloatEnvironment environment;
  dispatch(
      params,
      [&] {
        cpu::decode(attention::make_problem(params), cpu::threads_of(params.threads),
                    {params.workspace, params.workspace_bytes});
      },
      BLASST_ON_CUDA(run(params)));
}

void backward(const BackwardParams& params) {
  const attention::DefaultFloatEnvironment environment;
  cpu::backward(attention::make_problem(on_cpu(params)), cpu::threads_of(params.threads),
                {params.workspace, params.workspace_bytes});
}

void merge(const MergeParams& params) {
  const attention::DefaultFloatEnvironment environment;
  dispatch(
      params,
      [&] {
        attention::check_merge(params);
        cpu::merge(params, cpu::threads_of(params.threads));
      },
      BLASST_ON_CUDA(merge(params)));
}

void check_pages([[maybe_unused]] const KeysValues& kv, [[maybe_unused]] int64_t batch,
                 [[maybe_unused]] int32_t* found, [[maybe_unused]] void* stream) {
#if BLASST_CUDA
  cuda::check_pages(kv, batch, found, stream);
#else
  throw Error(BLASST_UNSUPPORTED, "check_pages needs a CUDA backend, which is not in this build");
#endif
}

std::size_t workspace_bytes(const PrefillParams& params) {
  return dispatch(
      params,
      [&] {
        return cpu::prefill_workspace_bytes(attention::make_problem(params),
                                            cpu::threads_of(params.threads));
      },
      BLASST_ON_CUDA(workspace_bytes(params)));
}

std::size_t workspace_bytes(const DecodeParams& params) {
  return dispatch(
      params,
      [&] {
        return cpu::decode_workspace_bytes(attention::make_problem(params),
                                           cpu::threads_of(params.threads));
      },
      BLASST_ON_CUDA(workspace_bytes(params)));
}

std::size_t workspace_bytes(const BackwardParams& params) {
  return cpu::backward_workspace_bytes(attention::make_problem(on_cpu(params)),
                                       cpu::threads_of(params.threads));
}

TileShape tile_shape(const PrefillParams& params) {
  return dispatch(
      params,
      [&] {
        attention::make_problem(params);  // parameters must be valid
        return cpu::prefill_shape();
      },
      BLASST_ON_CUDA(tile_shape(params)));
}

TileShape tile_shape(const DecodeParams& params) {
  return dispatch(
      params, [&] { return cpu::decode_shape(attention::make_problem(params)); },
      BLASST_ON_CUDA(tile_shape(params)));
}

std::string version() { return BLASST_VERSION; }

std::vector<BackendInfo> backends() {
  return {
    {BLASST_BACKEND_CPU, "cpu", true, fmt::format("{}, {} threads", cpu_isa(), default_threads())},
#if BLASST_CUDA
        cuda::info(),
#endif
  };
}

int default_threads() { return cpu::default_threads(); }

}  // namespace blasst
