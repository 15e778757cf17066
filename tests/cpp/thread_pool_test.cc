#include "cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

namespace blasst::cpu {
namespace {

TEST(ThreadPool, EveryItemOnceByAKnownWorker) {
  for (const int threads : {1, 2, 3, 5, 16}) {
    for (const int64_t items : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> calls(items);
      parallel_for(items, threads, [&](int64_t item, int worker) {
        EXPECT_GE(worker, 0);
        EXPECT_LT(worker, threads);
        ++calls[item];
      });
      for (int64_t i = 0; i < items; ++i)
        EXPECT_EQ(calls[i], 1) << threads << " threads, item " << i;
    }
  }
}

TEST(ThreadPool, OneWorkerNeverRunsTwoItemsAtOnce) {
  std::vector<std::atomic<bool>> busy(4);
  parallel_for(2000, 4, [&](int64_t, int worker) {
    EXPECT_FALSE(busy[worker].exchange(true));
    busy[worker] = false;
  });
}

TEST(ThreadPool, AnExceptionReachesTheCallerAndThePoolGoesOn) {
  const auto fail = [](int64_t item, int) {
    if (item == 3) throw std::runtime_error("item 3");
  };
  EXPECT_THROW(parallel_for(100, 3, fail), std::runtime_error);
  EXPECT_THROW(parallel_for(100, 1, fail), std::runtime_error);
  std::atomic<int> calls = 0;
  parallel_for(100, 3, [&](int64_t, int) { ++calls; });
  EXPECT_EQ(calls, 100);
}

TEST(ThreadPool, CallersTakeTurns) {
  std::atomic<int> calls = 0;
  std::vector<std::jthread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) parallel_for(20, 3, [&](int64_t, int) { ++calls; });
    });
  }
  callers.clear();  // joins
  EXPECT_EQ(calls, 4 * 50 * 20);
}

}  // namespace
}  // namespace blasst::cpu
