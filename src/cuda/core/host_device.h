// Plain functions that host code, its tests and kernels share.
#pragma once

#if defined(__CUDACC__)
#define BLASST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BLASST_HOST_DEVICE inline
#endif
