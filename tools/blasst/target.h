// Where the command runs a problem: on the CPU, or on its copy on a GPU.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "blasst/blasst.hpp"
#include "testing/backward.h"
#include "testing/compare.h"
#include "testing/problem.h"

namespace blasst::command {

class Target {
 public:
  virtual ~Target() = default;

  AttentionParams params;  // what the backend is called with; a command may change what it wants

  virtual void run() = 0;     // calls, and leaves the outputs in the problem
  virtual void finish() = 0;  // waits for calls that were made with `params`
  // Moves all keys and values through memory once; returns the bytes that were read and written.
  virtual size_t move_keys_and_values(int threads) = 0;
};

// On a GPU the call reports everything that the problem has room for, or only LSE and statistics.
std::unique_ptr<Target> make_target(check::Problem& problem, Backend backend, bool everything);

// A forward that has run there, and its backward.
class BackwardTarget {
 public:
  virtual ~BackwardTarget() = default;

  std::unique_ptr<check::BackwardProblem> problem;

  virtual void run() = 0;     // calls, and leaves the gradients in the problem
  virtual void call() = 0;    // calls
  virtual void finish() = 0;  // waits for calls
};

// Along the forward's tile bits, or without them: as if it had kept every tile.
std::unique_ptr<BackwardTarget> make_backward_target(check::Problem& forward, Backend backend,
                                                     bool with_bits);

check::Case case_for(check::Case c, Backend backend);  // like `c`, within what the backend does
Plan plan_on(const check::Problem& problem, Backend backend);
check::Comparison compare_on(const check::Problem& problem, Backend backend);  // after a run
std::string processor(Backend backend);  // the CPU's instruction set, or the GPU

}  // namespace blasst::command
