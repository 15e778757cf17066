// blasst: attention made sparse by softmax thresholding. The C++ interface.
//
//   blasst::PrefillParams p{.heads = 8, .kv_heads = 2, .head_dim = 128, .value_dim = 128, ...};
//   blasst::prefill(p);
//
// The structs, with shape and unit on every member, are in blasst.h.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "blasst/blasst.h"

namespace blasst {

using Backend = blasst_backend;
using DType = blasst_dtype;
using Order = blasst_order;
using TestKind = blasst_test;
using View = blasst_view;
using KeysValues = blasst_keys_values;
using Mask = blasst_mask;
using TileTest = blasst_tile_test;
using Report = blasst_report;
using PrefillParams = blasst_prefill_params;
using DecodeParams = blasst_decode_params;
using BackwardParams = blasst_backward_params;
using MergeParams = blasst_merge_params;
using TileShape = blasst_tile_shape;

// Thrown by every function below. what() says what was passed and what is accepted.
class Error : public std::runtime_error {
 public:
  Error(blasst_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  blasst_status status() const { return status_; }

 private:
  blasst_status status_;
};

// Attention of many query rows. Writes out and what the report asks for. Throws Error before
// anything is written.
BLASST_API void prefill(const PrefillParams& params);

// Attention of the last 1 to 16 positions of each request over its KV cache.
BLASST_API void decode(const DecodeParams& params);

// Gradients of prefill, from the lse and the tile bits that it reported.
BLASST_API void backward(const BackwardParams& params);

// One attention over two sets of keys, from an attention over each.
BLASST_API void merge(const MergeParams& params);

// Looks on the current CUDA device for page ids and lengths that paged keys do not have; writes
// four numbers to `found`, on the device (blasst_check_pages).
BLASST_API void check_pages(const KeysValues& kv, int64_t batch, int32_t* found, void* stream);

// Bytes that the call needs beyond its inputs and outputs.
BLASST_API std::size_t workspace_bytes(const PrefillParams& params);
BLASST_API std::size_t workspace_bytes(const DecodeParams& params);
BLASST_API std::size_t workspace_bytes(const BackwardParams& params);

// The tiles on which the backend decides.
BLASST_API TileShape tile_shape(const PrefillParams& params);
BLASST_API TileShape tile_shape(const DecodeParams& params);

BLASST_API std::string version();

// A backend of this build, and whether this machine can run it.
struct BackendInfo {
  Backend backend;
  std::string name;
  bool usable;
  std::string detail;  // cpu: the instruction set in use
};
BLASST_API std::vector<BackendInfo> backends();

// The CPU's instruction sets that kernels exist for and this machine has, best first. The first is
// used, unless the environment variable BLASST_CPU_ISA or set_cpu_isa names another.
BLASST_API std::vector<std::string> cpu_isas();
BLASST_API std::string cpu_isa();
BLASST_API void set_cpu_isa(const std::string& name);  // Error if it is not in cpu_isas()

// Threads that a call with threads = 0 uses: the processors that the process may use, and no more
// than its control groups' quota of CPU time, as it was at the first call.
BLASST_API int default_threads();

}  // namespace blasst
