// Kernels with one fault each, on the line that ends in "FAULT: <case>".
#include <vector>

#include "selftest.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void barrier_exit_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();  // FAULT: barrier_exit
}

__global__ void barrier_sites_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();  // FAULT: barrier_sites
  }
}

__global__ void barrier_in_warp_kernel() {
  if (threadIdx.x % 32 == 3) {
    __syncthreads();
  } else {
    __syncwarp();  // FAULT: barrier_in_warp
  }
}

__global__ void mask_omits_kernel() {
  __any_sync(0xfffffff7u, 1);  // FAULT: mask_omits
}

__global__ void mask_exited_kernel() {
  if (threadIdx.x == 1) return;
  __shfl_xor_sync(kAll, 1.0f, 2);  // FAULT: mask_exited
}

__global__ void mask_ragged_kernel() {
  __ballot_sync(kAll, 1);  // FAULT: mask_ragged
}

__global__ void mask_differs_kernel() {
  const unsigned mask = threadIdx.x == 9 ? 0x00000fffu : kAll;
  __syncwarp(mask);  // FAULT: mask_differs
}

__global__ void warp_sites_kernel() {
  if (threadIdx.x != 31) {
    __shfl_xor_sync(kAll, 1, 1);
  } else {
    __shfl_xor_sync(kAll, 1, 1);  // FAULT: warp_sites
  }
}

__global__ void source_range_kernel() {
  __shfl_sync(kAll, 1, 32);  // FAULT: source_range
}

__global__ void source_masked_kernel() {
  if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, 1, 20);  // FAULT: source_masked
}

__global__ void uninitialised_kernel(float* out) {
  __shared__ SharedArray<float, 64> a;
  if (blockIdx.x == 0) a[threadIdx.x] = 1.0f;  // the second block must not see the first one's
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x];  // FAULT: uninitialised
}

__global__ void out_of_bounds_kernel() {
  __shared__ SharedArray<float, 64> a;
  a[threadIdx.x + 1] = 1.0f;  // FAULT: out_of_bounds
}

__global__ void dynamic_out_of_bounds_kernel() {
  auto a = dynamic_shared<double>();
  a[threadIdx.x] = 1.0;  // FAULT: dynamic_out_of_bounds
}

__global__ void race_write_read_kernel(float* out) {
  __shared__ SharedArray<float, 64> a;
  a[threadIdx.x] = 1.0f;
  out[threadIdx.x] = a[threadIdx.x / 2];  // FAULT: race_write_read
}

__global__ void race_read_write_kernel(float* out) {
  __shared__ SharedArray<float, 64> a;
  a[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = a[63];
  if (threadIdx.x == 62) a[63] = 2.0f;  // FAULT: race_read_write
}

__global__ void race_write_write_kernel() {
  __shared__ SharedArray<int, 1> a;
  if (threadIdx.x % 32 == 0) a[0] = threadIdx.x;  // FAULT: race_write_write
}

// A shuffle makes lanes meet, but orders no memory.
__global__ void race_shuffle_kernel(int* out) {
  __shared__ SharedArray<int, 64> a;
  a[threadIdx.x] = 1;
  __shfl_xor_sync(kAll, 1, 1);
  out[threadIdx.x] = a[threadIdx.x ^ 1];  // FAULT: race_shuffle
}

// __syncwarp orders one warp, not two.
__global__ void race_two_warps_kernel(int* out) {
  __shared__ SharedArray<int, 64> a;
  a[threadIdx.x] = 1;
  __syncwarp();
  if (threadIdx.x >= 32) out[threadIdx.x] = a[threadIdx.x - 32];  // FAULT: race_two_warps
}

// The same bytes seen as two types.
__global__ void race_dynamic_kernel() {
  auto wide = dynamic_shared<double>();
  auto narrow = dynamic_shared<float>();
  if (threadIdx.x == 0) wide[1] = 1.0;
  if (threadIdx.x == 1) narrow[3] = 1.0f;  // FAULT: race_dynamic
}

__global__ void assertion_kernel(int limit) {
  __syncthreads();
  CUDA_KERNEL_ASSERT(static_cast<int>(threadIdx.x) < limit);  // FAULT: assertion
}

__global__ void static_too_large_kernel() {
  __shared__ SharedArray<double, 6000> a;
  __shared__ SharedArray<double, 1000> b;
  a[0] = 1.0;
  b[0] = 1.0;  // FAULT: static_too_large
}

__global__ void nothing_kernel() {}

// Faults that only a build with sanitizers sees.
__global__ void store_kernel(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void pack_kernel(float* out) { reinterpret_cast<float4*>(out)[threadIdx.x].x = 1.0f; }

alignas(16) float sink[256];
int int_sink[256];

}  // namespace

const Cases kFaultyCases = {
    {"barrier_exit", [] { launch(2, 64, 0, barrier_exit_kernel); }},
    {"barrier_sites", [] { launch(1, 64, 0, barrier_sites_kernel); }},
    {"barrier_in_warp", [] { launch(1, 64, 0, barrier_in_warp_kernel); }},
    {"mask_omits", [] { launch(1, 64, 0, mask_omits_kernel); }},
    {"mask_exited", [] { launch(1, 64, 0, mask_exited_kernel); }},
    {"mask_ragged", [] { launch(1, 40, 0, mask_ragged_kernel); }},
    {"mask_differs", [] { launch(1, 32, 0, mask_differs_kernel); }},
    {"warp_sites", [] { launch(1, 32, 0, warp_sites_kernel); }},
    {"source_range", [] { launch(1, 32, 0, source_range_kernel); }},
    {"source_masked", [] { launch(1, 32, 0, source_masked_kernel); }},
    {"uninitialised", [] { launch(2, 64, 0, uninitialised_kernel, sink); }},
    {"out_of_bounds", [] { launch(1, 64, 0, out_of_bounds_kernel); }},
    {"dynamic_out_of_bounds", [] { launch(1, 64, 511, dynamic_out_of_bounds_kernel); }},
    {"race_write_read", [] { launch(1, 64, 0, race_write_read_kernel, sink); }},
    {"race_read_write", [] { launch(1, 64, 0, race_read_write_kernel, sink); }},
    {"race_write_write", [] { launch(1, 64, 0, race_write_write_kernel); }},
    {"race_shuffle", [] { launch(1, 64, 0, race_shuffle_kernel, int_sink); }},
    {"race_two_warps", [] { launch(1, 64, 0, race_two_warps_kernel, int_sink); }},
    {"race_dynamic", [] { launch(1, 64, 512, race_dynamic_kernel); }},
    {"assertion", [] { launch(3, 64, 0, assertion_kernel, 60); }},
    {"static_too_large", [] { launch(1, 1, 0, static_too_large_kernel); }},
    {"launch_threads", [] { launch(1, 1025, 0, nothing_kernel); }},
    {"launch_no_blocks", [] { launch(0, 32, 0, nothing_kernel); }},
    {"launch_no_threads", [] { launch(1, {1, 0}, 0, nothing_kernel); }},
    {"launch_shared", [] { launch(1, 32, 227 * 1024 + 1, nothing_kernel); }},
    {"launch_shared_not_opted_in", [] { launch(1, 32, 48 * 1024 + 1, nothing_kernel); }},
    {"overflow", [] { launch(1, 33, 0, store_kernel, std::vector<float>(32).data()); }},
    {"misaligned", [] { launch(1, 8, 0, pack_kernel, sink + 1); }},
};
