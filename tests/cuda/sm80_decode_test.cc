// The portable decode kernel with the shared memory of other cards.
#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "cuda/sm80/decode/launch.h"
#include "cuda/sm80/decode/plan.h"
#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"

namespace blasst::check {
namespace {

namespace sm80 = cuda::decode::sm80;

constexpr int kKiB = 1024;
constexpr sm80::SharedMemory kRooms[] = {{163 * kKiB, 164 * kKiB}, {99 * kKiB, 100 * kKiB}};

// Of any GPU from 8.0 on, whichever backend the others test: plans of the same sizes are the same.
class Sm80Decode : public SizesOnGpu {
 protected:
  Sm80Decode() : SizesOnGpu(true) {}
};

TEST_P(Sm80Decode, InTheRoomOfOtherCards) {
  int64_t decisions = 0, skipped = 0;
  for (const sm80::SharedMemory room : kRooms) {
    if (room.block > sm80::shared_memory().block) continue;  // this card has less
    for (const auto& [group, queries] :
         {std::pair<int64_t, int64_t>{4, 1}, {16, 1}, {16, 2}, {16, 4}}) {
      const Case c{.seed = 9,
                   .decode = true,
                   .dtype = BLASST_BFLOAT16,
                   .requests = {{queries, 1300}, {1, 200}, {queries, 5}},
                   .heads = 2 * group,
                   .kv_heads = 2,
                   .head_dim = GetParam().qk,
                   .value_dim = GetParam().value,
                   .inputs = Inputs::kDrift,
                   .layout = Layout::kPaged,
                   .ragged_queries = queries > 1,
                   .page_size = 16,
                   .causal = true,
                   .test = BLASST_TEST_RELATIVE,
                   .threshold = 0.1f};
      if (group * queries > gpu_kernels().most_rows(c.head_dim)) continue;  // refused by the plan
      Problem problem(c);
      DeviceProblem device(problem);
      const bool fits = GetParam().qk < 256 || group * queries <= 32 || room.block > 99 * kKiB;
      const auto launch = [&] { sm80::launch(sm80::plan_launch(device.params), room); };
      if (!fits) {
        try {
          launch();
          ADD_FAILURE() << "no error: " << describe(c);
        } catch (const Error& error) {
          EXPECT_EQ(error.status(), BLASST_UNSUPPORTED);
          const std::string message = error.what();
          EXPECT_NE(message.find("bytes of shared memory"), message.npos) << message;
        }
        continue;
      }
      device.mark();
      launch();
      device.download();
      const Comparison comparison = compare_on_gpu(problem);
      EXPECT_EQ(comparison.mismatch, "") << room.block << ": " << describe(c);
      decisions += comparison.decisions;
      skipped += comparison.skipped;
    }
  }
  EXPECT_GT(skipped, decisions / 20);
}
INSTANTIATE_TEST_SUITE_P(, Sm80Decode, testing::ValuesIn(kHeadSizes), name_of_sizes);

}  // namespace
}  // namespace blasst::check
