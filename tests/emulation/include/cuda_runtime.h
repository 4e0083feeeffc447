// CUDA C++ for a host compiler: what a kernel's source may name, in terms of the emulator.
//
// Every function that can wait or go wrong takes its caller's file and line as defaulted arguments,
// so that a fault is reported where the kernel wrote it.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/engine.h"
#include "emulation/fault.h"
#include "emulation/intrinsics.h"
#include "emulation/shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One block runs at a time, so one copy will do; SharedArray forgets its contents from block to
// block.
#define __shared__ static

constexpr int warpSize = emulation::kWarpSize;

// The engine sets these before it resumes a thread. Plain variables: a kernel that wrote to them
// would not get past nvcc.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) {
  emulation::barrier(emulation::BarrierOp::kSync, 0, {file, line});
}
inline int __syncthreads_or(int predicate, EMULATION_SITE) {
  return emulation::barrier(emulation::BarrierOp::kOr, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, EMULATION_SITE) {
  return emulation::barrier(emulation::BarrierOp::kAnd, predicate, {file, line});
}
inline int __syncthreads_count(int predicate, EMULATION_SITE) {
  return emulation::barrier(emulation::BarrierOp::kCount, predicate, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  emulation::warp_operation({emulation::WarpOp::kSync, mask, 0, 0, 0, {file, line}});
}

namespace emulation {

template <typename T>
T shuffle(WarpOp op, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "warp shuffles move 32-bit and 64-bit arithmetic types");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int lane = source_lane(op, operand, width, site);
  bits = warp_operation({op, mask, bits, sizeof(T), lane, site});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned vote(WarpOp op, unsigned mask, int predicate, Site site) {
  return static_cast<unsigned>(warp_operation({op, mask, predicate != 0, 0, 0, site}));
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, EMULATION_SITE) {
  return emulation::shuffle(emulation::WarpOp::kShfl, mask, value, lane, width, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_SITE) {
  return emulation::shuffle(emulation::WarpOp::kShflUp, mask, value, static_cast<int>(delta), width,
                            {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_SITE) {
  return emulation::shuffle(emulation::WarpOp::kShflDown, mask, value, static_cast<int>(delta),
                            width, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, EMULATION_SITE) {
  return emulation::shuffle(emulation::WarpOp::kShflXor, mask, value, lane_mask, width,
                            {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return emulation::vote(emulation::WarpOp::kBallot, mask, predicate, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return static_cast<int>(emulation::vote(emulation::WarpOp::kAny, mask, predicate, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return static_cast<int>(emulation::vote(emulation::WarpOp::kAll, mask, predicate, {file, line}));
}

// One thread runs at a time, and none is interrupted.
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address = old + value;
  return old;
}

#undef EMULATION_SITE
