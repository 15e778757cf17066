#include "cpu/processors.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace blasst::cpu {
namespace {

namespace fs = std::filesystem;

constexpr int kNoQuota = std::numeric_limits<int>::max();

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool contains(const std::vector<std::string>& parts, std::string_view part) {
  return std::ranges::find(parts, part) != parts.end();
}

// The group of this process that limits CPU time, in the hierarchy of this version: a path below
// the hierarchy's root; empty if there is none.
std::string group_of_process(const fs::path& root, bool version1) {
  std::ifstream file(root / "proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // id:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (version1 ? contains(split(controllers, ','), "cpu") : controllers.empty())
      return line.substr(second + 1);
  }
  return {};
}

// Processors that this group's own quota amounts to.
int quota_of(const fs::path& group, bool version1) {
  double quota = 0, period = 0;
  if (version1) {
    std::ifstream(group / "cpu.cfs_quota_us") >> quota;  // -1: none
    std::ifstream(group / "cpu.cfs_period_us") >> period;
  } else {
    std::ifstream(group / "cpu.max") >> quota >> period;  // "max": none, and not a number
  }
  if (!(quota > 0 && period > 0)) return kNoQuota;
  return static_cast<int>(std::min<double>(kNoQuota, std::ceil(quota / period)));
}

}  // namespace

int quota_processors(const fs::path& root) {
  int least = kNoQuota;
  std::ifstream file(root / "proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    // id parent device root mount-point options [tag...] - type source options
    const std::vector<std::string> fields = split(line, ' ');
    const auto dash = std::ranges::find(fields, "-");
    if (fields.end() - dash < 4 || dash - fields.begin() < 6) continue;
    const bool version1 = dash[1] == "cgroup" && contains(split(dash[3], ','), "cpu");
    if (!version1 && dash[1] != "cgroup2") continue;
    const std::string path = group_of_process(root, version1);
    if (path.empty()) continue;
    const fs::path mount = root / fs::path(fields[4]).relative_path();
    // A mount may show a part of the hierarchy, of which the process sees itself inside or outside.
    const fs::path below = fs::path(path).lexically_relative(fields[3]);
    fs::path group = mount;
    least = std::min(least, quota_of(group, version1));
    if (below.empty() || *below.begin() == "..") continue;
    for (const fs::path& part : below) {
      group /= part;
      least = std::min(least, quota_of(group, version1));
    }
  }
  return least;
}

int default_threads() {
  static constinit std::atomic<int> quota = 0;  // 0: not known yet
  if (quota == 0) quota = quota_processors("/");
  cpu_set_t set;
  const int bound = sched_getaffinity(0, sizeof set, &set) == 0
                        ? CPU_COUNT(&set)
                        : static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, std::min(bound, quota.load()));
}

}  // namespace blasst::cpu
