// A backend: takes a call, or says why not.
#pragma once

#include <string>

#include "blasst/blasst.hpp"
#include "problem/geometry.h"

namespace blasst::api {

// Which processors a call's tensors can be read by.
struct Memory {
  bool host = true;
  bool gpu = false;
};

// Members throw Error; BLASST_UNSUPPORTED, with the backend's name and what it does instead,
// where it does not take the call.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual blasst_backend id() const = 0;
  virtual BackendInfo info() const = 0;

  // What keeps it, on this machine, from working in this memory; empty: nothing.
  virtual std::string obstacle(Memory memory) const = 0;

  // Reads scalars only.
  virtual Plan plan(const AttentionParams& params, problem::Phase phase) const = 0;
  virtual Plan plan(const BackwardParams& params) const = 0;

  virtual void run(const AttentionParams& params, problem::Phase phase) const = 0;
  virtual void run(const BackwardParams& params) const = 0;
  virtual void merge(const MergeParams& params) const = 0;
};

}  // namespace blasst::api
