#include "cuda/pages.h"

#include "attention/checks.h"
#include "cuda/checks.h"
#include "cuda/sm90/tensor.h"

namespace blasst::cuda {

PageCheck plan_page_check(const KeysValues& kv, int64_t batch, int32_t* found, void* stream) {
  using attention::fail;
  if (!kv.page_table) fail("kv.page_table is null; the check is of paged keys");
  if (!found) fail("found is null; it must be room for four numbers");
  attention::check_range("batch", batch, 0, 1 << 20);
  return {.table = kv.page_table,
          .lengths = kv.lengths,
          .batch = batch,
          .stride = kv.page_table_stride,
          .page_size = kv.page_size,
          .pages = kv.pages,
          .room = check_page_table(kv, kUnlimited - 1),
          .found = found,
          .stream = stream};
}

}  // namespace blasst::cuda
