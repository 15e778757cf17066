// Clocks and counters of the bench command.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

namespace blasst::command {

// Median milliseconds of each of the calls. Every round times all of them, one after the other, so
// that a machine that slows down slows all alike; a call shorter than `least_ms` is repeated within
// its turn. A turn ends with `finish`, which waits for what the calls have started.
std::vector<double> median_ms(
    const std::vector<std::function<void()>>& calls, int rounds, double least_ms = 20,
    const std::function<void()>& finish = [] {});

// Reads all bytes once, on `threads` threads; returns something that depends on them.
unsigned long long read_all(std::span<const std::span<const std::byte>> buffers, int threads);

double peak_rss_mb();

}  // namespace blasst::command
