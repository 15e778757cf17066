#include "api/guard.h"

#include <exception>
#include <new>

namespace blasst::api {
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

}  // namespace

blasst_status failure() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return failed(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return failed(BLASST_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(BLASST_INTERNAL, error.what());
  } catch (...) {
    return failed(BLASST_INTERNAL, "unknown error");
  }
}

void forget_failure() noexcept { last_error.clear(); }

}  // namespace blasst::api

extern "C" const char* blasst_last_error(void) { return blasst::api::last_error.c_str(); }
