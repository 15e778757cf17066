// The CPU backend's entry points, for a validated problem.
#pragma once

#include <cstddef>

#include "attention/problem.h"

namespace blasst::cpu {

// Where a call's temporary memory comes from; null: it is allocated.
struct Workspace {
  void* data;
  std::size_t bytes;
};

std::size_t prefill_workspace_bytes(const attention::Problem& p, int threads);
std::size_t decode_workspace_bytes(const attention::Problem& p, int threads);
std::size_t backward_workspace_bytes(const attention::BackwardProblem& p, int threads);

void prefill(const attention::Problem& p, int threads, Workspace workspace);
void decode(const attention::Problem& p, int threads, Workspace workspace);
void backward(const attention::BackwardProblem& p, int threads, Workspace workspace);

// Parameters as check_merge leaves them.
void merge(const MergeParams& params, int threads);

}  // namespace blasst::cpu
