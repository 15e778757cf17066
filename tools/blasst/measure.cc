#include "measure.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>

namespace blasst::command {
namespace {

double time_ms(const std::function<void()>& call, int count, const std::function<void()>& finish) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) call();
  finish();
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - start;
  return elapsed.count() / count;
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

uint64_t read_slice(std::span<const std::byte> bytes) {
  // Independent sums, so that only memory limits the loop.
  uint64_t sums[16] = {};
  for (size_t at = 0; at + sizeof sums <= bytes.size(); at += sizeof sums) {
    uint64_t words[16];
    std::memcpy(words, bytes.data() + at, sizeof words);
    for (int i = 0; i < 16; ++i) sums[i] += words[i];
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

}  // namespace

std::vector<double> median_ms(const std::vector<std::function<void()>>& calls, int rounds,
                              double least_ms, const std::function<void()>& finish) {
  std::vector<int> counts;
  for (const auto& call : calls) {  // also warms up
    time_ms(call, 1, finish);
    const double once = std::max(1e-3, time_ms(call, 1, finish));
    counts.push_back(std::max(1, static_cast<int>(std::ceil(least_ms / once))));
  }
  std::vector<std::vector<double>> times(calls.size());
  for (int round = 0; round < rounds; ++round)
    for (size_t i = 0; i < calls.size(); ++i)
      times[i].push_back(time_ms(calls[i], counts[i], finish));
  std::vector<double> medians;
  for (const auto& samples : times) medians.push_back(median(samples));
  return medians;
}

unsigned long long read_all(std::span<const std::span<const std::byte>> buffers, int threads) {
  std::atomic<uint64_t> sum = 0;
  {
    std::vector<std::jthread> readers;
    for (int i = 0; i < threads; ++i) {
      readers.emplace_back([&, i] {
        for (const auto bytes : buffers) {
          const size_t begin = bytes.size() / threads * i;
          const size_t end = i + 1 == threads ? bytes.size() : bytes.size() / threads * (i + 1);
          sum += read_slice(bytes.subspan(begin, end - begin));
        }
      });
    }
  }
  return sum;
}

double peak_rss_mb() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

}  // namespace blasst::command
