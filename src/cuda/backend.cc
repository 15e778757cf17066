#include "cuda/backend.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <string>

#include "cuda/sm90/decode/plan.h"
#include "cuda/sm90/prefill/plan.h"

namespace blasst::cuda {
namespace {

// What keeps the current device from being used; empty: nothing.
std::string obstacle() {
  int devices = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&devices); status != cudaSuccess)
    return cudaGetErrorString(status);
  if (devices == 0) return "no GPU";
  int device = 0, major = 0, minor = 0, driver = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0)
    return fmt::format("device {} has compute capability {}.{}; the kernels are for 9.0", device,
                       major, minor);
  cudaDriverGetVersion(&driver);
  if (driver / 1000 < CUDART_VERSION / 1000)
    return fmt::format("the driver is of CUDA {}.{}; this build needs one of CUDA {}",
                       driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000);
  return "";
}

void check_usable() {
  if (const std::string why = obstacle(); !why.empty())
    throw Error(BLASST_UNSUPPORTED, "cuda-sm90 is not usable: " + why);
}

}  // namespace

void run(const PrefillParams& params) {
  const prefill::Launch launch = prefill::plan(params);
  check_usable();
  prefill::launch(launch);
}

std::size_t workspace_bytes(const PrefillParams& params) {
  return prefill::workspace_bytes(params);
}

TileShape tile_shape(const PrefillParams& params) { return prefill::tile_shape(params); }

void run(const DecodeParams& params) {
  const decode::Launch launch = decode::plan(params);
  check_usable();
  decode::launch(launch);
}

std::size_t workspace_bytes(const DecodeParams& params) { return decode::workspace_bytes(params); }

TileShape tile_shape(const DecodeParams& params) { return decode::tile_shape(params); }

BackendInfo info() {
  std::string why = obstacle();
  if (!why.empty()) return {BLASST_BACKEND_CUDA_SM90, "cuda-sm90", false, why};
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device);
  return {BLASST_BACKEND_CUDA_SM90, "cuda-sm90", true,
          fmt::format("{}, {} multiprocessors", properties.name, properties.multiProcessorCount)};
}

}  // namespace blasst::cuda
