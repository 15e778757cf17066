#include "cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace blasst::cpu {
namespace {

using Work = std::function<void(int64_t, int)>;

// Waking a thread that sleeps takes longer than a small batch, and batches often follow each other
// closely: a thread that waits looks for this long before it sleeps.
constexpr std::chrono::microseconds kLook{500};

// Whether `condition` came true meanwhile. Lets other threads of this processor run.
template <typename Condition>
bool look_for(const Condition& condition) {
  for (const auto end = std::chrono::steady_clock::now() + kLook;;) {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return true;
    }
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::yield();
  }
}

class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool pool;
    return pool;
  }

  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
  }

  void run(int64_t items, int threads, const Work& work) {
    std::lock_guard turn(turn_);
    {
      std::lock_guard lock(mutex_);
      while (std::ssize(workers_) < threads - 1) {
        const int worker = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, worker, seen = generation_.load()] { loop(worker, seen); });
      }
      work_ = &work;
      items_ = items;
      next_ = 0;
      error_ = nullptr;
      helpers_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(0);
    std::unique_lock lock(mutex_);
    helpers_ = 0;  // a worker that has not woken up yet is not waited for: nothing is left for it
    lock.unlock();
    look_for([&] { return running_ == 0; });
    lock.lock();
    done_.wait(lock, [&] { return running_ == 0; });
    work_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void loop(int worker, uint64_t seen) {
    for (;;) {
      look_for([&] { return generation_ != seen; });
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || (generation_ != seen && worker <= helpers_); });
        if (stopping_) return;
        seen = generation_;
        ++running_;
      }
      drain(worker);
      std::lock_guard lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  void drain(int worker) {
    try {
      for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;)
        (*work_)(item, worker);
    } catch (...) {
      next_ = items_;
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex turn_;  // one batch at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool stopping_ = false;
  std::atomic<uint64_t> generation_ = 0;
  int helpers_ = 0;               // workers 1..helpers_ may join this batch
  std::atomic<int> running_ = 0;  // those that have
  const Work* work_ = nullptr;
  int64_t items_ = 0;
  std::atomic<int64_t> next_ = 0;
  std::exception_ptr error_;
  std::vector<std::jthread> workers_;  // last: joined before what they use goes
};

}  // namespace

int default_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

void parallel_for(int64_t items, int threads, const Work& work) {
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) work(item, 0);
    return;
  }
  ThreadPool::instance().run(items, threads, work);
}

}  // namespace blasst::cpu
