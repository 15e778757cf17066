// blasst: attention made sparse by softmax thresholding. The C++ interface, header only, over the C
// one.
//
//   blasst::AttentionParams p{
//       .problem = {.heads = 8, .kv_heads = 2, .head_dim = 128, .value_dim = 128, ...},
//       .decision = {.test = {.kind = BLASST_TEST_RELATIVE, .values = &threshold}}};
//   blasst::prefill(p);
//
// The structs, with shape and unit on every member, are in blasst.h.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "blasst/blasst.h"

namespace blasst {

using Backend = blasst_backend;
using DType = blasst_dtype;
using Layout = blasst_layout;
using Order = blasst_order;
using TestKind = blasst_test;
using Scores = blasst_scores;
using View = blasst_view;
using KeysValues = blasst_keys_values;
using Scales = blasst_scales;
using Mask = blasst_mask;
using TileTest = blasst_tile_test;
using Problem = blasst_problem;
using Decision = blasst_decision;
using Report = blasst_report;
using Execution = blasst_execution;
using Gradients = blasst_gradients;
using AttentionParams = blasst_attention_params;
using BackwardParams = blasst_backward_params;
using MergeParams = blasst_merge_params;
using TileShape = blasst_tile_shape;
using Plan = blasst_plan;

// Thrown by every function below. what() says what was passed and what is accepted.
class Error : public std::runtime_error {
 public:
  Error(blasst_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  blasst_status status() const { return status_; }

 private:
  blasst_status status_;
};

namespace detail {

inline void check(blasst_status status) {
  if (status == BLASST_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status != BLASST_OK) throw Error(status, blasst_last_error());
}

}  // namespace detail

// Attention of many query rows. Writes out and what the report asks for. Throws Error before
// anything is written.
inline void prefill(const AttentionParams& params) { detail::check(blasst_prefill(&params)); }

// Attention of the last 1 to 16 positions of each request over its KV cache.
inline void decode(const AttentionParams& params) { detail::check(blasst_decode(&params)); }

// Gradients of prefill, from the lse and the tile bits that it reported.
inline void backward(const BackwardParams& params) { detail::check(blasst_backward(&params)); }

// One attention over two sets of keys, from an attention over each.
inline void merge(const MergeParams& params) { detail::check(blasst_merge(&params)); }

// What a call decides on and needs. Reads scalars only: pointers may be null.
inline Plan prefill_plan(const AttentionParams& params) {
  Plan plan;
  detail::check(blasst_prefill_plan(&params, &plan));
  return plan;
}

inline Plan decode_plan(const AttentionParams& params) {
  Plan plan;
  detail::check(blasst_decode_plan(&params, &plan));
  return plan;
}

inline Plan backward_plan(const BackwardParams& params) {
  Plan plan;
  detail::check(blasst_backward_plan(&params, &plan));
  return plan;
}

// Looks on the current CUDA device for page ids and lengths that paged keys do not have; writes
// four numbers to `found`, on the device (blasst_check_pages).
inline void check_pages(const Problem& problem, int32_t* found, void* stream) {
  detail::check(blasst_check_pages(&problem, found, stream));
}

inline std::string version() { return blasst_version(); }

// A backend of this build, and whether this machine can run it.
struct BackendInfo {
  Backend backend;
  std::string name;
  std::string architecture;  // its kernels are for; cpu: the instruction set in use
  bool usable;
  std::string detail;  // the device; or why it is not usable
};

// In the order in which BLASST_BACKEND_AUTO asks them.
inline std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> all;
  for (int32_t i = 0; i < blasst_backend_count(); ++i) {
    blasst_backend_info info;
    detail::check(blasst_backend_at(i, &info));
    all.push_back({info.backend, info.name, info.architecture, info.usable != 0, info.detail});
  }
  return all;
}

// The CPU's instruction sets that kernels exist for and this machine has, best first. The first is
// used, unless the environment variable BLASST_CPU_ISA or set_cpu_isa names another.
inline std::vector<std::string> cpu_isas() {
  const char* list = nullptr;
  detail::check(blasst_cpu_isas(&list));
  std::vector<std::string> names(1);
  for (const char* c = list; *c; ++c) {
    if (*c == ',') {
      names.emplace_back();
    } else {
      names.back() += *c;
    }
  }
  return names;
}
inline std::string cpu_isa() {
  const char* name = nullptr;
  detail::check(blasst_cpu_isa(&name));
  return name;
}
// Error if it is not in cpu_isas().
inline void set_cpu_isa(const std::string& name) {
  detail::check(blasst_set_cpu_isa(name.c_str()));
}

// Threads that a call with threads = 0 uses (blasst_default_threads).
inline int default_threads() { return blasst_default_threads(); }

}  // namespace blasst
