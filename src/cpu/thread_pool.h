// Runs a batch of independent work items on a fixed number of threads.
#pragma once

#include <cstdint>
#include <functional>

namespace blasst::cpu {

// Processors this process may use.
int default_threads();

// Calls work(item, worker) for every item in [0, items), each once, on `threads` threads including
// the caller's; worker in [0, threads) tells them apart. Items are handed out in order, one at a
// time, so put the longest first. Returns when all are done. Threads are kept for the next call.
// Concurrent calls take turns; the first exception of `work` is rethrown here once every thread has
// stopped.
void parallel_for(int64_t items, int threads,
                  const std::function<void(int64_t item, int worker)>& work);

}  // namespace blasst::cpu
