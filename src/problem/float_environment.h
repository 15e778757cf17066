// The floating-point environment of a call.
#pragma once

#include <cfenv>

namespace blasst::problem {

// Round to nearest, subnormals kept, no traps: every call computes so, on all of its threads,
// whatever its caller has set. The caller's environment, its exception flags among it, comes back
// with the end of the scope.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&callers_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t callers_;
};

}  // namespace blasst::problem
