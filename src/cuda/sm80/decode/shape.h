// The shared memory and registers of the decode kernel. Plain host code.
#pragma once

#include "cuda/core/host_device.h"

namespace blasst::cuda::decode::sm80 {

// Whether the kernel has registers for the result of a group beside that of a split.
BLASST_HOST_DEVICE constexpr bool folds(int value_dim, int kernel_rows) {
  return kernel_rows <= 32 && value_dim * kernel_rows <= 128 * 16;
}

inline constexpr int kMostStages = 3;

// What the device has: bytes that a block, or all blocks of a multiprocessor, may take.
struct SharedMemory {
  int block, multiprocessor;
};
inline constexpr int kReservedBytes = 1024;  // of a block, by the system

// Stages of a block that takes `fixed` bytes and `each` for a stage: so many that two blocks share
// a multiprocessor; where that leaves fewer than two, as many as one block has room for. 0: none.
inline int stages(SharedMemory room, int fixed, int each) {
  const auto fit = [&](int blocks) {
    for (int n = kMostStages; n > 0; --n) {
      const int bytes = fixed + n * each;
      if (bytes <= room.block && blocks * (bytes + kReservedBytes) <= room.multiprocessor) return n;
    }
    return 0;
  };
  const int of_two = fit(2);
  return of_two >= 2 ? of_two : fit(1);
}

}  // namespace blasst::cuda::decode::sm80
