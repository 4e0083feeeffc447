// Stands in for c10's header where the kernels run on the CPU: one stream, on which all work is
// already done.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

class CUDAStream {
 public:
  cudaStream_t stream() const { return nullptr; }
  operator cudaStream_t() const { return nullptr; }
  void synchronize() const {}
};

inline CUDAStream getCurrentCUDAStream(DeviceIndex /*device*/ = -1) { return {}; }
inline CUDAStream getDefaultCUDAStream(DeviceIndex /*device*/ = -1) { return {}; }

}  // namespace c10::cuda
