// What a random problem is put through beside its own call: its backward, its keys in two parts,
// another floating-point environment, thresholds that are none, chunks of its keys.
#pragma once

#include <string>

#include "testing/case.h"
#include "testing/problem.h"

namespace blasst::check {

// Each returns what does not agree; empty: everything does.

// Whether the problem has a backward: a prefill with exact scores.
bool has_gradients(const Problem& problem);

// The gradients, of the LSE too with odd seeds, against the reference. After problem.run().
std::string check_gradients(Problem& problem);

// Attention over the first keys of each request and over the others, merged: the whole. The tile
// test, the block mask, the layout of keys and int8 scores do not count here.
std::string check_merge(const Problem& problem);

// Where the caller rounds upwards and flushes subnormal numbers: the same bits, on any number of
// threads, and the caller's environment stays.
std::string check_environment(Problem& problem);

// The CPU refuses NaN among the thresholds and writes nothing.
std::string check_nan_threshold(Problem& problem);

// Random keys in chunks: taken up at once or piece by piece, on any number of threads; boundaries
// where the rule has them; sums in double precision; tiles within the budget.
std::string check_chunks(Choices& choose);

// All of these, as far as the problem has them; the CPU's. After problem.run().
std::string check_calls(Problem& problem, Choices& choose);

}  // namespace blasst::check
