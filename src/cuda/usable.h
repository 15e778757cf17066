// Whether a machine can run the kernels.
#pragma once

#include <algorithm>
#include <span>
#include <string>

#include "problem/text.h"

namespace blasst::cuda {

// What the driver says. Versions as CUDA writes them: 1000 * major + 10 * minor.
struct Machine {
  int runtime = 0;  // version that this build is for
  int driver = 0;   // newest version that the driver does; 0: no driver
  int devices = 0;
  int device = 0;  // the current one, and its compute capability
  int major = 0, minor = 0;
  std::string error;  // of asking
};

// Compute capabilities that kernels run on: 10 * major + minor.
struct Capabilities {
  int least, most;
  const char* name;
};
inline constexpr Capabilities kSm90{90, 90, "9.0"}, kSm80{80, 9999, "8.0 and later"};

// Whether one of the machine codes, of such capabilities, runs on a device of this one: that of its
// generation, if it is not newer.
inline bool has_code(std::span<const int> codes, int capability) {
  return std::ranges::any_of(
      codes, [&](int code) { return code / 10 == capability / 10 && code <= capability; });
}

// What keeps the current device from being used; empty: nothing. codes: what there is machine code
// for; other devices' drivers compile PTX, which they can if they are not older than the toolkit.
inline std::string obstacle(const Machine& m, const Capabilities& kernels,
                            std::span<const int> codes) {
  if (m.driver == 0) return "no NVIDIA driver";
  if (m.driver / 1000 < m.runtime / 1000)
    return formatted("the driver does CUDA {}.{}; this build needs a driver of CUDA {}",
                     m.driver / 1000, m.driver % 1000 / 10, m.runtime / 1000);
  if (!m.error.empty()) return m.error;
  if (m.devices == 0) return "no GPU";
  const int capability = 10 * m.major + m.minor;
  if (capability < kernels.least || capability > kernels.most)
    return formatted("device {} has compute capability {}.{}; the kernels are for {}", m.device,
                     m.major, m.minor, kernels.name);
  if (m.driver < m.runtime && !has_code(codes, capability))
    return formatted(
        "the driver does CUDA {}.{}; for compute capability {}.{} this build has PTX alone, which "
        "needs a driver of CUDA {}.{}",
        m.driver / 1000, m.driver % 1000 / 10, m.major, m.minor, m.runtime / 1000,
        m.runtime % 1000 / 10);
  return "";
}

}  // namespace blasst::cuda
