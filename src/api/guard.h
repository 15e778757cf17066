// Exceptions turned into a status and a message.
#pragma once

#include <string>
#include <utility>

#include "blasst/blasst.hpp"

namespace blasst::api {

// Of the exception that is being handled; keeps its message for blasst_last_error.
blasst_status failure() noexcept;

void forget_failure() noexcept;

template <typename Call>
blasst_status guarded(const Call& call) noexcept {
  forget_failure();
  try {
    call();
    return BLASST_OK;
  } catch (...) {
    return failure();
  }
}

template <typename T>
void require(const T* pointer, const char* name) {
  if (!pointer) throw Error(BLASST_INVALID_ARGUMENT, std::string(name) + " is null");
}

template <typename T>
void set_defaults(T* value) {
  if (value) *value = {};
}

}  // namespace blasst::api
