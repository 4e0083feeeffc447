// Shared memory, declared so that the kernels also compile as host C++.
//
// Under nvcc a SharedArray is a plain array. Elsewhere <cuda_runtime.h> is the emulation's, which
// defines a SharedArray of its own that notices unwritten elements, bad indices and races.
#pragma once

#include <cuda_runtime.h>

#ifdef __CUDACC__
template <typename T, int N>
struct SharedArray {
  T data[N];
  __device__ T& operator[](int i) { return data[i]; }
};
#endif
