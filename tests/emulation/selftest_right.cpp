// Kernels that are right, and whether their results are.
#include <stdexcept>
#include <vector>

#include "selftest.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

void expect(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("wrong result: ") + what);
}

template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = warpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAll, value, offset);
  }
  return value;
}

template <typename T>
__device__ T block_sum(T value) {
  __shared__ SharedArray<T, 32> partial;
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  value = warp_sum(value);
  __syncthreads();  // the last call's readers have finished
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  T total = 0;
  for (unsigned i = 0; i < blockDim.x / warpSize; ++i) total += partial[i];
  return total;
}

template <typename T>
__global__ void reduce_kernel(const T* in, T* out, int n) {
  T sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[blockIdx.x * n + i];
  for (int repeat = 0; repeat < 3; ++repeat) {
    const T total = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = total;
  }
}

template <typename T>
void block_reduction() {
  const int n = 1000, blocks = 5;
  std::vector<T> in(n * blocks), out(blocks);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<T>(i);
  for (const unsigned threads : {32u, 96u, 256u, 1024u}) {
    launch(blocks, threads, 0, reduce_kernel<T>, in.data(), out.data(), n);
    for (int b = 0; b < blocks; ++b) {
      T sum = 0;
      for (int i = 0; i < n; ++i) sum += in[b * n + i];
      expect(out[b] == sum, "block sum");
    }
  }
}

// Two arrays of different types in one dynamic allocation, the second behind the first.
__global__ void reverse_kernel(float* data, int n) {
  auto values = dynamic_shared<float>();
  auto order = dynamic_shared<short>() + 2 * n;
  const int i = threadIdx.x;
  values[i] = data[i];
  order[i] = static_cast<short>(n - 1 - i);
  __syncthreads();
  data[i] = values[order[i]];
}

void dynamic_shared_memory() {
  for (const int n : {1, 31, 33, 250}) {
    std::vector<float> data(n);
    for (int i = 0; i < n; ++i) data[i] = static_cast<float>(i);
    launch(1, n, n * (sizeof(float) + sizeof(short)), reverse_kernel, data.data(), n);
    for (int i = 0; i < n; ++i) expect(data[i] == static_cast<float>(n - 1 - i), "reversal");
  }
}

__global__ void large_kernel(float* out) {
  auto values = dynamic_shared<float>();
  values[50000] = 1.0f;
  *out = values[50000];
}

void opted_in_shared_memory() {
  float out = 0;
  cudaFuncSetAttribute(large_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024);
  launch(1, 1, 227 * 1024, large_kernel, &out);
  expect(out == 1.0f, "large dynamic memory");
}

// 77 threads: the third warp has 13 lanes.
__global__ void ragged_kernel(int* out) {
  const unsigned left = blockDim.x - threadIdx.x / warpSize * warpSize;
  const unsigned mask = left >= 32 ? kAll : (1u << left) - 1;
  const int lane = threadIdx.x % warpSize;
  int value = lane;
  for (int offset = 1; offset < warpSize; offset *= 2) {  // inclusive scan
    const int below = __shfl_up_sync(mask, value, offset);
    if (lane >= offset) value += below;
  }
  const int last = __shfl_sync(mask, value, left >= 32 ? 31 : static_cast<int>(left) - 1);
  out[threadIdx.x] = value + 10000 * __popc(__ballot_sync(mask, lane % 2)) + 1000000 * (last > 78);
}

void ragged_last_warp() {
  std::vector<int> out(77);
  launch(1, 77, 0, ragged_kernel, out.data());
  for (int i = 0; i < 77; ++i) {
    const int lane = i % 32, odd = i < 64 ? 16 : 6;
    expect(out[i] == lane * (lane + 1) / 2 + 10000 * odd + 1000000 * (i < 64), "ragged warp");
  }
}

__global__ void votes_kernel(long long* out) {
  const int i = threadIdx.x;
  long long code = __syncthreads_count(i % 3 == 0);
  code = code * 2 + (__syncthreads_or(i == 40) != 0);
  code = code * 2 + (__syncthreads_and(i != 40) != 0);
  code = code * 2 + __any_sync(kAll, i == 40);
  code = code * 2 + __all_sync(kAll, i != 40);
  const double half = __shfl_down_sync(kAll, i * 0.5, 4, 8);
  out[i] = code * 1000 + static_cast<long long>(half * 2);
}

void votes_and_widths() {
  std::vector<long long> out(64);
  launch(1, 64, 0, votes_kernel, out.data());
  for (int i = 0; i < 64; ++i) {
    const long long votes = 22 * 16 + 8 + (i < 32 ? 1 : 2);
    expect(out[i] == votes * 1000 + (i % 8 < 4 ? i + 4 : i), "votes");
  }
}

// Within a warp __syncwarp orders, also for half of the warp at a time, and also by way of a third
// thread.
__global__ void syncwarp_kernel(int* out) {
  __shared__ SharedArray<int, 33> a;
  const int lane = threadIdx.x;
  a[lane] = lane;
  __syncwarp();
  const int right = a[(lane + 1) % 32];
  __syncwarp();
  a[lane] = right;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  __syncwarp(half);
  const int sum = a[lane ^ 1] + a[lane];
  __syncwarp(half);
  if (lane == 0) a[32] = 7;
  if (lane < 2) __syncwarp(0x3u);
  if (lane == 1 || lane == 2) __syncwarp(0x6u);
  if (lane == 2) a[32] = a[32] + 1;
  __syncthreads();
  out[lane] = sum + 1000 * a[32];
}

void syncwarp_orders() {
  std::vector<int> out(32);
  launch(1, 32, 0, syncwarp_kernel, out.data());
  for (int i = 0; i < 32; ++i) {
    expect(out[i] == 8000 + (i + 1) % 32 + ((i ^ 1) + 1) % 32, "syncwarp");
  }
}

__global__ void indices_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + block + thread;
}

void three_dimensions() {
  std::vector<int> out(24 * 60);
  launch({2, 3, 4}, {3, 4, 5}, 0, indices_kernel, out.data());
  for (int i = 0; i < 24 * 60; ++i) expect(out[i] == 1 + i / 60 + i % 60, "indices");
}

// Not right on a device: global memory tells who came last.
__global__ void order_kernel(int* out) { *out = static_cast<int>(blockIdx.x * 64 + threadIdx.x); }

void order_of_turns() {
  int last = -1;
  launch(3, 64, 0, order_kernel, &last);
  expect(last == 3 * 64 - 1, "the last thread came last");
}

}  // namespace

const Cases kRightCases = {
    {"block_reduction", [] { block_reduction<float>(), block_reduction<double>(); }},
    {"block_reduction_integers", [] { block_reduction<int>(), block_reduction<long long>(); }},
    {"dynamic_shared_memory", dynamic_shared_memory},
    {"opted_in_shared_memory", opted_in_shared_memory},
    {"ragged_last_warp", ragged_last_warp},
    {"votes_and_widths", votes_and_widths},
    {"syncwarp_orders", syncwarp_orders},
    {"three_dimensions", three_dimensions},
    {"order_of_turns", order_of_turns},
};

// What went wrong in a case, in words; empty where nothing did.
extern "C" const char* selftest_run(const char* name) {
  static std::string message;
  message.clear();
  try {
    (kRightCases.count(name) != 0 ? kRightCases : kFaultyCases).at(name)();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
