#include "cuda/pages.h"

#include "cuda/core/checks.h"
#include "problem/checks.h"

namespace blasst::cuda {

PageCheck plan_page_check(const blasst_problem& problem, int32_t* found, void* stream) {
  using problem::fail;
  const KeysValues& kv = problem.kv;
  problem::check_range("batch", problem.batch, 0, 1 << 20);
  problem::check_keys(kv);
  if (kv.layout != BLASST_LAYOUT_PAGED)
    fail("kv.layout is {}; the check is of paged keys (2)", static_cast<int>(kv.layout));
  if (!kv.page_table) fail("kv.page_table is null; the check is of paged keys");
  if (!kv.lengths) fail("kv.lengths is null; paged keys need the length of each request");
  if (!found) fail("found is null; it must be room for four numbers");
  check_page_size(kCuda, kv);
  return {.table = kv.page_table,
          .lengths = kv.lengths,
          .batch = problem.batch,
          .stride = kv.page_table_stride,
          .page_size = kv.page_size,
          .pages = kv.pages,
          .room = problem::most_keys(problem),
          .found = found,
          .stream = stream};
}

}  // namespace blasst::cuda
