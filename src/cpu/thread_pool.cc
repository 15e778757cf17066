#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <cfenv>

namespace blasst::cpu {
namespace {

using namespace std::chrono_literals;

// Waking a thread that sleeps takes longer than a small batch, and batches often follow each other
// closely: a thread that waits looks for this long before it sleeps.
constexpr std::chrono::microseconds kLook{500};

// Long enough for the pauses of an interactive program.
constexpr std::chrono::milliseconds kIdle{10s};

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

// The process's pool, made at its first use.
constinit std::atomic<ThreadPool*> process_pool = nullptr;

// After a fork the pool's threads are the parent's, and a lock that one of them held stays locked
// here: the child makes a pool of its own, and leaves this one as it is.
constinit ThreadPool* parents_pool = nullptr;

struct ProcessHooks {
  ProcessHooks() {
    pthread_atfork(nullptr, nullptr, [] {
      if (ThreadPool* pool = process_pool.exchange(nullptr)) parents_pool = pool;
    });
  }
  // When the process ends or the library is unloaded. The pool itself stays: another thread may
  // still be in a call.
  ~ProcessHooks() {
    if (ThreadPool* pool = process_pool) pool->stop();
  }
} const process_hooks;

// Takes no lock, which a fork might leave locked in the child.
ThreadPool& pool_of_process() {
  if (ThreadPool* pool = process_pool) return *pool;
  auto made = std::make_unique<ThreadPool>(kIdle);
  ThreadPool* first = nullptr;
  if (process_pool.compare_exchange_strong(first, made.get())) return *made.release();
  return *first;
}

}  // namespace

void ThreadPool::run(int64_t items, int threads, const Work& work) {
  std::lock_guard turn(turn_);
  std::unique_lock lock(mutex_);
  work_ = &work;
  items_ = items;
  next_ = 0;
  error_ = nullptr;
  const int called = call_workers(threads - 1);
  lock.unlock();
  for (int i = 0; i < called; ++i) workers_[i]->wake.notify_one();
  drain(0);
  lock.lock();
  // A worker that has not woken up yet is not waited for: nothing is left for it.
  for (int i = 0; i < called; ++i) workers_[i]->called = false;
  lock.unlock();
  look_for([&] { return running_ == 0; });
  lock.lock();
  done_.wait(lock, [&] { return running_ == 0; });
  work_ = nullptr;
  if (error_) std::rethrow_exception(error_);
}

// Of the first `count` workers, new ones among them, as many as can be had.
int ThreadPool::call_workers(int count) {
  if (stopping_) return 0;
  std::erase_if(workers_, [](const auto& worker) { return worker->ended; });
  try {
    workers_.reserve(count);
    while (std::ssize(workers_) < count) {
      auto worker = std::make_unique<Worker>();
      worker->thread = std::jthread([this, w = worker.get()] { loop(*w); });
      workers_.push_back(std::move(worker));
    }
  } catch (const std::exception&) {
    // As many threads as there are must do: std::system_error, or no memory for one more.
  }
  count = std::min(count, static_cast<int>(workers_.size()));
  for (int i = 0; i < count; ++i) {
    workers_[i]->index = i + 1;
    workers_[i]->called = true;
  }
  return count;
}

void ThreadPool::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  for (const auto& worker : workers_) worker->wake.notify_one();
  for (const auto& worker : workers_) {
    if (worker->thread.joinable()) worker->thread.join();
  }
}

int ThreadPool::size() {
  std::lock_guard lock(mutex_);
  return static_cast<int>(std::ranges::count(workers_, false, &Worker::ended));
}

void ThreadPool::loop(Worker& worker) {
  std::fesetenv(FE_DFL_ENV);
  for (;;) {
    look_for([&] { return worker.called.load(); });
    int index = 0;
    {
      std::unique_lock lock(mutex_);
      worker.wake.wait_for(lock, idle_, [&] { return stopping_ || worker.called; });
      worker.ended = !worker.called;
      if (worker.ended) return;
      worker.called = false;
      index = worker.index;
      ++running_;
    }
    drain(index);
    std::lock_guard lock(mutex_);
    if (--running_ == 0) done_.notify_one();
  }
}

void ThreadPool::drain(int worker) {
  try {
    for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;)
      (*work_)(item, worker);
  } catch (...) {
    next_ = items_;
    std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void parallel_for(int64_t items, int threads, const Work& work) {
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) work(item, 0);
    return;
  }
  pool_of_process().run(items, threads, work);
}

}  // namespace blasst::cpu
