// Which work item a block takes after its first: whoever comes first takes the next.
//
// The counter is a word of the workspace that nobody clears before the kernel, which would cost
// more than all the turns. The first block that asks makes it 0 and signs for it with the launch's
// signature, a number of 64 bits that no launch shares; the combining kernel, which runs when all
// turns are over, takes the signature away, for a captured graph comes again with the same one.
#pragma once

#include "cuda/core/decode/params.h"

namespace blasst::cuda::decode {

// The next number from 0 on. One thread.
__device__ __forceinline__ int take_turn(const Turns& turns) {
  volatile unsigned long long* signature = turns.signature;
  const unsigned long long found = *signature, mine = turns.of_launch, at_work = ~mine;
  if (found != mine) {
    if (found != at_work && atomicCAS(turns.signature, found, at_work) == found) {
      *turns.taken = 0;
      __threadfence();  // the counter is seen before the signature
      *signature = mine;
    } else {
      while (*signature != mine) {
      }
    }
  }
  __threadfence();  // and read after it
  return atomicAdd(turns.taken, 1);
}

// No launch has this one.
__device__ __forceinline__ void remove_signature(const Turns& turns) {
  if (turns.signature) *turns.signature = 0;
}

}  // namespace blasst::cuda::decode
