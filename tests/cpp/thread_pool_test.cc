#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <fstream>
#include <stdexcept>
#include <string>
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

using namespace std::chrono_literals;

// Has every one of the threads take an item; returns their ids in the order of the workers.
std::vector<pid_t> threads_of_batch(ThreadPool& pool, int threads) {
  std::barrier all(threads);
  std::vector<pid_t> ids(threads);
  pool.run(threads, threads, [&](int64_t, int worker) {
    ids[worker] = gettid();
    all.arrive_and_wait();
  });
  return ids;
}

TEST(ThreadPool, ThreadsThatHaveNothingToDoEnd) {
  ThreadPool pool(1ms);
  threads_of_batch(pool, 9);
  while (pool.size() > 0) std::this_thread::sleep_for(1ms);
  threads_of_batch(pool, 3);
  EXPECT_LE(pool.size(), 2) << "started again, as many as are needed";
}

// A field of a thread in /proc: State, voluntary_ctxt_switches.
std::string status_of(pid_t thread, const std::string& field) {
  std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(field)) return line.substr(field.size() + 1);
  }
  return {};
}

TEST(ThreadPool, ABatchOfTwoWakesNoMore) {
  ThreadPool pool(1h);
  const std::vector<pid_t> ids = threads_of_batch(pool, 6);
  const auto sleeps = [&](int worker) {
    return std::stol(status_of(ids[worker], "voluntary_ctxt_switches"));
  };
  std::vector<long> before;
  for (size_t i = 0; i < ids.size(); ++i) {
    while (i > 0 && status_of(ids[i], "State").find("S (sleeping)") == std::string::npos)
      std::this_thread::yield();
    before.push_back(sleeps(i));
  }
  constexpr int kRounds = 100;
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<pid_t> two = threads_of_batch(pool, 2);
    EXPECT_EQ(two[1], ids[1]);
  }
  // One that slept in front of a lock, on its way to sleep for good, has slept once or twice more.
  for (size_t i = 2; i < ids.size(); ++i)
    EXPECT_LT(sleeps(i) - before[i], kRounds / 10) << "worker " << i;
}

TEST(ThreadPool, AThreadThatCannotBeMadeCostsSpeedNotTheCall) {
  ThreadPool pool(1h);
  threads_of_batch(pool, 2);
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_getattr_default_np(&attributes), 0);
  size_t stack = 0;
  pthread_attr_getstacksize(&attributes, &stack);
  ASSERT_EQ(pthread_attr_setstacksize(&attributes, size_t{1} << 60), 0);  // no room for any
  ASSERT_EQ(pthread_setattr_default_np(&attributes), 0);
  std::atomic<int> calls = 0;
  pool.run(1000, 8, [&](int64_t, int worker) {
    EXPECT_LT(worker, 2);
    ++calls;
  });
  EXPECT_EQ(calls, 1000);
  EXPECT_EQ(pool.size(), 1);
  pthread_attr_setstacksize(&attributes, stack);
  pthread_setattr_default_np(&attributes);
  pthread_attr_destroy(&attributes);
  threads_of_batch(pool, 8);
  EXPECT_EQ(pool.size(), 7);
}

TEST(ThreadPool, AfterTheEndTheCallerWorksAlone) {
  ThreadPool pool(1h);
  threads_of_batch(pool, 3);
  pool.stop();
  EXPECT_EQ(pool.size(), 0);
  std::atomic<int> calls = 0;
  pool.run(100, 3, [&](int64_t, int worker) {
    EXPECT_EQ(worker, 0);
    ++calls;
  });
  EXPECT_EQ(calls, 100);
}

}  // namespace
}  // namespace blasst::cpu
