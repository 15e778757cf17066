// In how many parts, all alike, the query heads of a KV head decide on a decode's tiles.
#pragma once

#include <cstdint>

#include "blasst/blasst.hpp"

namespace blasst::problem {

// The fewest whose rows (query heads times positions) are at most `query_rows`; of one head each if
// even those have more.
int64_t head_parts(const blasst_problem& problem, int64_t query_rows);

}  // namespace blasst::problem
