// How many threads a call uses that does not say.
#pragma once

#include <filesystem>

namespace blasst::cpu {

// Processors this process may use: those it is bound to, and no more than its control groups give
// it time for. At least 1.
int default_threads();

// What a call's `threads` stands for: 0: default_threads().
inline int threads_of(int threads) { return threads > 0 ? threads : default_threads(); }

// The tightest quota of CPU time among the control groups that the process belongs to (versions 1
// and 2), in processors, rounded up; INT_MAX without one. `root`: where /proc and the control
// groups are found, "/" but in tests.
int quota_processors(const std::filesystem::path& root);

}  // namespace blasst::cpu
