// Which work item a block takes after its first: whoever comes first takes the next.
//
// The counter is a word of the workspace that nobody clears before the kernel, which would cost
// more than all the turns. The first block that asks makes it 0 and signs for it with the launch's
// signature, a number of 64 bits that no launch shares; the combining kernel, which runs when all
// turns are over, takes the signature away, for a captured graph comes again with the same one.
#pragma once

#include "cuda/core/decode/params.h"

namespace blasst::cuda::decode {

__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* at) {
  unsigned long long found;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(at) : "memory");
  return found;
}
__device__ __forceinline__ void store_release(unsigned long long* at, unsigned long long x) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(x) : "memory");
}

// The turns that a block takes. One thread.
class Turn {
 public:
  // The next number from 0 on. It comes later: the first use waits for it.
  __device__ __forceinline__ int take(const Turns& turns) {
    if (!signed_) sign(turns);
    signed_ = true;
    return atomicAdd(turns.taken, 1);
  }

 private:
  __device__ __forceinline__ void sign(const Turns& turns) {
    const unsigned long long mine = turns.of_launch, at_work = ~mine;
    const unsigned long long found = load_acquire(turns.signature);
    if (found == mine) return;
    if (found != at_work && atomicCAS(turns.signature, found, at_work) == found) {
      *turns.taken = 0;
      store_release(turns.signature, mine);
    } else {
      while (load_acquire(turns.signature) != mine) {
      }
    }
  }

  bool signed_ = false;  // this launch's signature was seen
};

// No launch has this one.
__device__ __forceinline__ void remove_signature(const Turns& turns) {
  if (turns.signature) *turns.signature = 0;
}

}  // namespace blasst::cuda::decode
