// The C functions: choose a backend, hand it the call.
#include <functional>
#include <string>

#include "api/choose.h"
#include "api/guard.h"
#include "blasst/blasst.h"
#include "cpu/isa.h"
#include "cpu/processors.h"
#include "problem/checks.h"
#include "problem/text.h"
#if BLASST_CUDA
#include "cuda/backend.h"
#endif

namespace {

using namespace blasst;
using api::guarded;
using api::require;
using api::set_defaults;
using problem::Phase;

// Before anything else of the caller's struct is read.
template <typename Params>
void check_sizes(const Params* params) {
  require(params, "params");
  problem::check_struct_size("params", params->struct_size, sizeof *params);
  problem::check_execution(params->execution);
}

// `data`: of the tensor that says where the others are.
void choose(const Execution& execution, const void* data,
            const std::function<void(const api::Backend&)>& ask) {
  const bool any = execution.backend == BLASST_BACKEND_AUTO;
  api::choose(api::backends(), execution.backend, any ? api::memory_of(data) : api::Memory{}, ask);
}

template <typename Params, typename... Phases>
blasst_status run(const Params* params, Phases... phase) {
  return guarded([&] {
    check_sizes(params);
    choose(params->execution, params->problem.q.data,
           [&](const api::Backend& backend) { backend.run(*params, phase...); });
  });
}

template <typename Params, typename... Phases>
blasst_status make_plan(const Params* params, blasst_plan* plan, Phases... phase) {
  return guarded([&] {
    check_sizes(params);
    require(plan, "plan");
    problem::check_struct_size("plan", plan->struct_size, sizeof *plan);
    choose(params->execution, params->problem.q.data,
           [&](const api::Backend& backend) { *plan = backend.plan(*params, phase...); });
  });
}

}  // namespace

extern "C" {

void blasst_attention_params_init(blasst_attention_params* params) { set_defaults(params); }
void blasst_backward_params_init(blasst_backward_params* params) { set_defaults(params); }
void blasst_merge_params_init(blasst_merge_params* params) { set_defaults(params); }
void blasst_plan_init(blasst_plan* plan) { set_defaults(plan); }
void blasst_backend_info_init(blasst_backend_info* info) { set_defaults(info); }

blasst_status blasst_prefill(const blasst_attention_params* params) {
  return run(params, Phase::kPrefill);
}

blasst_status blasst_decode(const blasst_attention_params* params) {
  return run(params, Phase::kDecode);
}

blasst_status blasst_backward(const blasst_backward_params* params) { return run(params); }

blasst_status blasst_merge(const blasst_merge_params* params) {
  return guarded([&] {
    check_sizes(params);
    choose(params->execution, params->out.data,
           [&](const api::Backend& backend) { backend.merge(*params); });
  });
}

blasst_status blasst_prefill_plan(const blasst_attention_params* params, blasst_plan* plan) {
  return make_plan(params, plan, Phase::kPrefill);
}

blasst_status blasst_decode_plan(const blasst_attention_params* params, blasst_plan* plan) {
  return make_plan(params, plan, Phase::kDecode);
}

blasst_status blasst_backward_plan(const blasst_backward_params* params, blasst_plan* plan) {
  return make_plan(params, plan);
}

blasst_status blasst_check_pages([[maybe_unused]] const blasst_problem* problem,
                                 [[maybe_unused]] int32_t* found, [[maybe_unused]] void* stream) {
  return guarded([&] {
#if BLASST_CUDA
    require(problem, "problem");
    problem::check_struct_size("problem", problem->struct_size, sizeof *problem);
    cuda::check_pages(*problem, found, stream);
#else
    throw Error(BLASST_UNSUPPORTED, "check_pages needs a CUDA backend, which is not in this build");
#endif
  });
}

int32_t blasst_backend_count(void) { return static_cast<int32_t>(api::backends().size()); }

blasst_status blasst_backend_at(int32_t index, blasst_backend_info* info) {
  return guarded([&] {
    require(info, "info");
    problem::check_struct_size("info", info->struct_size, sizeof *info);
    problem::check_range("index", index, 0, blasst_backend_count() - 1);
    static thread_local BackendInfo last;
    last = api::backends()[index]->info();
    info->backend = last.backend;
    info->name = last.name.c_str();
    info->architecture = last.architecture.c_str();
    info->usable = last.usable;
    info->detail = last.detail.c_str();
  });
}

blasst_status blasst_cpu_isas(const char** names) {
  return guarded([&] {
    require(names, "names");
    static const std::string list = join(cpu::isa_names(), ",");
    *names = list.c_str();
  });
}

blasst_status blasst_cpu_isa(const char** name) {
  return guarded([&] {
    require(name, "name");
    *name = cpu::isa_name().c_str();
  });
}

blasst_status blasst_set_cpu_isa(const char* name) {
  return guarded([&] {
    require(name, "name");
    cpu::set_isa(name);
  });
}

int32_t blasst_default_threads(void) { return cpu::default_threads(); }

const char* blasst_version(void) { return BLASST_VERSION; }

}  // extern "C"
