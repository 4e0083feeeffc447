// What the kernels share: launches, 16-byte packs, reductions over a warp and a block.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lsoftmax.h"
#include "shared.cuh"

namespace lsoftmax {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr unsigned kFullMask = 0xffffffffu;

// Where one block, or few, load number by number: one a thread, so that no load waits for another.
inline int threads_for_each(int64_t numbers) {
  int threads = kWarp;
  while (threads < kMaxThreads && threads < numbers) threads *= 2;
  return threads;
}

// One block a row; enough threads that each has a few 16-byte packs to load at a time.
inline int threads_for(int64_t elements) { return threads_for_each((elements + 7) / 8); }

// cudaLaunchKernelEx rather than <<<>>>: the same launch compiles as host C++.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t stream,
                   const Params& params) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// The index of the lowest bit set; `word` is not 0.
__device__ __forceinline__ int lowest_bit(unsigned word) {
#ifdef __CUDACC__
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

// V elements that travel in one load or store. V = 1 serves ragged ends and misaligned rows.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T values[V];
};

// The emulation of tests/ counts the bytes that packs move: those of the passes over logits.
#ifndef LSOFTMAX_COUNT_BYTES
#define LSOFTMAX_COUNT_BYTES(total, bytes)
#endif

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  LSOFTMAX_COUNT_BYTES(bytes_read, sizeof(Pack<T, V>));
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  LSOFTMAX_COUNT_BYTES(bytes_written, sizeof(Pack<T, V>));
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// To the nearest of those that TF32 has: 11 digits. NaN stays.
__device__ __forceinline__ float round_tf32(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  if (v == v) bits = (bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu;
  memcpy(&v, &bits, sizeof(bits));
  return v;
}

// What is stored where T's backward products read exponentials: see Storage. Of float16 these are
// tensor cores that read TF32, as many digits as float16 has.
template <typename T>
__device__ __forceinline__ typename Storage<T>::E as_exponential(typename Storage<T>::Acc v) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    return round_tf32(v);
  } else {
    return static_cast<typename Storage<T>::E>(v);
  }
}

// Elements of a row before its first 16-byte boundary, at most `count`.
template <typename T>
__device__ __forceinline__ int64_t misaligned_head(const T* row, int64_t count) {
  const auto past = reinterpret_cast<uintptr_t>(row) % 16;
  const auto head = static_cast<int64_t>((16 - past) % 16 / sizeof(T));
  return head < count ? head : count;
}

// Shuffles of any small struct, one 32-bit word at a time.
template <typename V>
__device__ __forceinline__ V shuffle_xor(V value, int lane_mask) {
  static_assert(sizeof(V) % 4 == 0, "shuffles move whole words");
  unsigned words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (unsigned k = 0; k < sizeof(V) / 4; ++k) {
    words[k] = __shfl_xor_sync(kFullMask, words[k], lane_mask);
  }
  memcpy(&value, words, sizeof(V));
  return value;
}

// The reduction of every thread's value, the same bits in every thread and in every run. `op` must
// be commutative; blocks are whole warps.
template <typename V, typename Op>
__device__ V block_reduce(V value, Op op) {
  __shared__ SharedArray<V, kMaxThreads / kWarp> partial;
#pragma unroll
  for (int lane_mask = kWarp / 2; lane_mask > 0; lane_mask /= 2) {
    value = op(value, shuffle_xor(value, lane_mask));
  }
  __syncthreads();  // an earlier reduction's values may still be being read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    const V other = partial[warp];
    value = op(value, other);
  }
  return value;
}

// Thread 0's value, in every thread.
template <typename V>
__device__ V block_broadcast(const V& value) {
  __shared__ SharedArray<V, 1> slot;
  __syncthreads();  // as above
  if (threadIdx.x == 0) slot[0] = value;
  __syncthreads();
  return slot[0];
}

}  // namespace lsoftmax
