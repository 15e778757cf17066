// A process that forks: the child has none of the pool's threads, and whatever another thread held
// at that moment stays held there.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <thread>

#include "cpu/thread_pool.h"
#include "testing/problem.h"

static bool is_child = false;

// LeakSanitizer does not find the threads of a forked child, and takes what they hold for lost.
extern "C" int __lsan_is_turned_off() { return is_child; }

namespace blasst::check {
namespace {

// ThreadSanitizer does not let the child of a process with threads start any.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadsAfterFork = false;
#else
constexpr bool kThreadsAfterFork = true;
#endif

constexpr unsigned kSeconds = 100;  // a child that still runs then hangs

// The child's exit status, as a shell says it: 128 + signal when one ended it, 142 (SIGALRM) for a
// child that hangs.
int status_of(const std::function<void()>& child) {
  fflush(nullptr);
  const pid_t id = fork();
  if (id == 0) {
    is_child = true;
    alarm(kSeconds);
    child();
    _exit(125);  // it must end by itself
  }
  int status = 0;
  while (waitpid(id, &status, 0) < 0) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

class Fork : public testing::Test {
 protected:
  void SetUp() override {
    if (!kThreadsAfterFork) GTEST_SKIP() << "under ThreadSanitizer";
    problem_.run();
    wanted_ = problem_.out_bits();
  }

  bool same_again() {
    problem_.run();
    return problem_.out_bits() == wanted_;
  }

  Problem problem_{
      {.requests = {{600, 600}}, .heads = 4, .kv_heads = 2, .causal = true, .threads = 3}};
  std::vector<std::byte> wanted_;
};

TEST_F(Fork, AChildThatDoesNothingExits) {
  EXPECT_EQ(status_of([] { std::exit(7); }), 7);
}

TEST_F(Fork, AChildThatUsesThePoolExits) {
  EXPECT_EQ(status_of([&] { std::exit(same_again() ? 7 : 8); }), 7);
}

TEST_F(Fork, AndSoDoesItsOwnChild) {
  EXPECT_EQ(status_of([&] {
              const bool same = same_again();
              const int inner = status_of([&] { std::exit(same_again() ? 7 : 8); });
              std::exit(same && same_again() ? inner : 9);
            }),
            7);
}

TEST_F(Fork, WhileAnotherThreadIsInsideThePool) {
  std::atomic<bool> stop = false;
  std::atomic<int64_t> batches = 0;
  std::jthread busy([&] {
    while (!stop) {
      cpu::parallel_for(64, 3, [](int64_t, int) {});
      ++batches;
    }
  });
  for (int i = 0; i < 30; ++i) {
    const int64_t before = batches;
    while (batches == before) std::this_thread::yield();
    EXPECT_EQ(status_of([&] { _exit(same_again() ? 7 : 8); }), 7);
  }
  EXPECT_TRUE(same_again()) << "the parent goes on";
  stop = true;
}

TEST_F(Fork, ExitWhileAnotherThreadIsInsideThePool) {
  EXPECT_EQ(status_of([&] {
              std::thread([] {
                for (;;) cpu::parallel_for(64, 3, [](int64_t, int) {});
              }).detach();
              same_again();
              std::exit(7);
            }),
            7);
}

}  // namespace
}  // namespace blasst::check
