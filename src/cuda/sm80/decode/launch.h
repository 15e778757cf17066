// Launching the decode kernels. No CUDA types, so that any host code may include it.
#pragma once

#include "cuda/core/decode/launch.h"
#include "cuda/sm80/decode/shape.h"

namespace blasst::cuda::decode::sm80 {

// The part of the plan that the shapes decide; rows: of a KV head. Throws Error.
Plan make_plan(int batch, int kv_heads, int key_length, int rows, int value_dim);

// What the current device has.
SharedMemory shared_memory();

// BLASST_UNSUPPORTED where a block of the call's kernel takes more. Of a plan's scalars.
void check_room(const blasst_problem& problem, SharedMemory room);

// Enqueues everything on the stream; allocates nothing. Throws Error.
void launch(const Launch& launch);

// The same with no more shared memory than that.
void launch(const Launch& launch, SharedMemory room);

}  // namespace blasst::cuda::decode::sm80
