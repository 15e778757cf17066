// The public C++ entry points: check the parameters, hand the problem to the backend.
#include <fmt/format.h>

#include "attention/problem.h"
#include "blasst/blasst.hpp"
#include "cpu/backend.h"
#include "cpu/plan.h"
#include "cpu/thread_pool.h"

namespace blasst {
namespace {

template <typename Params>
int threads_of(const Params& params) {
  return params.threads > 0 ? params.threads : default_threads();
}

}  // namespace

void prefill(const PrefillParams& params) {
  cpu::prefill(attention::make_problem(params), threads_of(params),
               {params.workspace, params.workspace_bytes});
}

void decode(const DecodeParams& params) {
  cpu::decode(attention::make_problem(params), threads_of(params),
              {params.workspace, params.workspace_bytes});
}

std::size_t workspace_bytes(const PrefillParams& params) {
  return cpu::prefill_workspace_bytes(attention::make_problem(params), threads_of(params));
}

std::size_t workspace_bytes(const DecodeParams& params) {
  return cpu::decode_workspace_bytes(attention::make_problem(params), threads_of(params));
}

TileShape tile_shape(const PrefillParams& params) {
  attention::make_problem(params);  // parameters must be valid
  return cpu::prefill_shape();
}

TileShape tile_shape(const DecodeParams& params) {
  return cpu::decode_shape(attention::make_problem(params));
}

std::string version() { return BLASST_VERSION; }

std::vector<BackendInfo> backends() {
  return {{BLASST_BACKEND_CPU, "cpu", true,
           fmt::format("{}, {} threads", cpu_isa(), default_threads())}};
}

int default_threads() { return cpu::default_threads(); }

}  // namespace blasst
