// The C interface: the C++ one with exceptions turned into a status and a message.
#include <exception>
#include <new>
#include <string>

#include "blasst/blasst.h"
#include "blasst/blasst.hpp"

namespace {

thread_local std::string last_error;

blasst_status failed(blasst_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

template <typename Call>
blasst_status guarded(const Call& call) noexcept {
  last_error.clear();
  try {
    call();
    return BLASST_OK;
  } catch (const blasst::Error& error) {
    return failed(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return failed(BLASST_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(BLASST_INTERNAL, error.what());
  } catch (...) {
    return failed(BLASST_INTERNAL, "unknown error");
  }
}

template <typename T>
void require(const T* pointer, const char* name) {
  if (!pointer) throw blasst::Error(BLASST_INVALID_ARGUMENT, std::string(name) + " is null");
}

template <typename Params, typename Result, typename Query>
blasst_status query(const Params* params, Result* result, const char* name,
                    const Query& query) noexcept {
  return guarded([&] {
    require(params, "params");
    require(result, name);
    *result = query(*params);
  });
}

}  // namespace

extern "C" {

void blasst_prefill_params_init(blasst_prefill_params* params) {
  if (params) *params = {};
}

void blasst_decode_params_init(blasst_decode_params* params) {
  if (params) *params = {};
}

void blasst_backward_params_init(blasst_backward_params* params) {
  if (params) *params = {};
}

void blasst_merge_params_init(blasst_merge_params* params) {
  if (params) *params = {};
}

blasst_status blasst_prefill(const blasst_prefill_params* params) {
  return guarded([&] {
    require(params, "params");
    blasst::prefill(*params);
  });
}

blasst_status blasst_decode(const blasst_decode_params* params) {
  return guarded([&] {
    require(params, "params");
    blasst::decode(*params);
  });
}

blasst_status blasst_backward(const blasst_backward_params* params) {
  return guarded([&] {
    require(params, "params");
    blasst::backward(*params);
  });
}

blasst_status blasst_merge(const blasst_merge_params* params) {
  return guarded([&] {
    require(params, "params");
    blasst::merge(*params);
  });
}

blasst_status blasst_check_pages(const blasst_keys_values* kv, int64_t batch, int32_t* found,
                                 void* stream) {
  return guarded([&] {
    require(kv, "kv");
    blasst::check_pages(*kv, batch, found, stream);
  });
}

blasst_status blasst_prefill_workspace_bytes(const blasst_prefill_params* params, size_t* bytes) {
  return query(params, bytes, "bytes", [](const auto& p) { return blasst::workspace_bytes(p); });
}

blasst_status blasst_decode_workspace_bytes(const blasst_decode_params* params, size_t* bytes) {
  return query(params, bytes, "bytes", [](const auto& p) { return blasst::workspace_bytes(p); });
}

blasst_status blasst_backward_workspace_bytes(const blasst_backward_params* params, size_t* bytes) {
  return query(params, bytes, "bytes", [](const auto& p) { return blasst::workspace_bytes(p); });
}

blasst_status blasst_prefill_tile_shape(const blasst_prefill_params* params,
                                        blasst_tile_shape* shape) {
  return query(params, shape, "shape", [](const auto& p) { return blasst::tile_shape(p); });
}

blasst_status blasst_decode_tile_shape(const blasst_decode_params* params,
                                       blasst_tile_shape* shape) {
  return query(params, shape, "shape", [](const auto& p) { return blasst::tile_shape(p); });
}

const char* blasst_last_error(void) { return last_error.c_str(); }

const char* blasst_version(void) { return BLASST_VERSION; }

}  // extern "C"
