// The CUDA calls that launching needs. Throws Error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <initializer_list>
#include <type_traits>

namespace blasst::cuda {

// Throws unless the call succeeded. The runtime remembers the newest error of a thread: what is
// thrown is not left there, and what the caller left there is not thrown.
void check(cudaError_t status, const char* what);

// The status of a call that may fail; an error is not left behind.
cudaError_t forgotten(cudaError_t status);

// Zeros, on the stream; nothing where there is no data.
void clear(void* data, std::size_t bytes, cudaStream_t stream);

// Gives the thread the current device's context, which the driver's functions want.
void take_context();

// Of the current device.
int multiprocessors();
int most_shared_memory();  // bytes that a block may take
int shared_memory_of_multiprocessor();

// Blocks of the kernel that the current device runs at once, at least one a multiprocessor.
int resident_blocks(const void* kernel, int threads, int shared_bytes);

// Enqueues a kernel, by its address and those of its arguments.
void enqueue(const void* kernel, dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
             std::initializer_list<const void*> arguments);

template <typename... Parameters>
void enqueue(void (*kernel)(Parameters...), dim3 blocks, int threads, cudaStream_t stream,
             const std::type_identity_t<Parameters>&... arguments) {
  enqueue(reinterpret_cast<const void*>(kernel), blocks, threads, 0, stream, {&arguments...});
}

// Lets the kernel have so much dynamic shared memory; BLASST_UNSUPPORTED where there is less.
void allow_shared_memory(const void* kernel, int bytes);

}  // namespace blasst::cuda
