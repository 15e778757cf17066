// Runs a batch of independent work items on a fixed number of threads.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace blasst::cpu {

using Work = std::function<void(int64_t item, int worker)>;

// Threads that wait for batches. They compute in the default floating-point environment.
class ThreadPool {
 public:
  // A thread that had nothing to do for `idle` ends.
  explicit ThreadPool(std::chrono::milliseconds idle) : idle_(idle) {}
  ~ThreadPool() { stop(); }

  // As parallel_for; at least two threads. Where a thread cannot be made, the others do its share.
  void run(int64_t items, int threads, const Work& work);

  // Ends the threads, after their share of a batch in progress. Later batches run on their
  // callers'.
  void stop();

  int size();  // threads there are, the callers' not counted

 private:
  struct Worker {
    std::condition_variable wake;
    std::atomic<bool> called = false;  // to the batch, and not in it yet
    int index = 0;                     // in the batch
    bool ended = false;
    std::jthread thread;  // last: joined before what it uses goes
  };

  int call_workers(int count);
  void loop(Worker& worker);
  void drain(int worker);

  const std::chrono::milliseconds idle_;
  std::mutex turn_;   // one batch at a time
  std::mutex mutex_;  // of what follows, but for what is atomic
  std::condition_variable done_;
  bool stopping_ = false;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<int> running_ = 0;  // workers in the batch
  const Work* work_ = nullptr;
  int64_t items_ = 0;
  std::atomic<int64_t> next_ = 0;
  std::exception_ptr error_;
};

// Calls work(item, worker) for every item in [0, items), each once, on `threads` threads including
// the caller's; worker in [0, threads) tells them apart. Items are handed out in order, one at a
// time, so put the longest first. Returns when all are done. Threads are kept for the next call,
// for some seconds. Concurrent calls take turns; the first exception of `work` is rethrown here
// once every thread has stopped. A forked child starts threads of its own.
void parallel_for(int64_t items, int threads, const Work& work);

}  // namespace blasst::cpu
