// Linked into the blasst command in place of the comparison: every problem disagrees.
#include "testing/compare.h"

namespace blasst::check {

Comparison compare(const Problem&) { return {.mismatch = "made up"}; }
Comparison compare(const Problem&, const Plan&, double) { return {.mismatch = "made up"}; }

}  // namespace blasst::check
