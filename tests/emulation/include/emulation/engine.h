// What device code may ask of the emulator: barriers, warp operations, and (for the host) a launch.
//
// Each thread of a block is a fiber. Blocks run one after another; within a block a thread runs
// until it must wait for others. So nothing here is concurrent, and every run of a test is the same
// run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

#include "emulation/fault.h"

namespace emulation {

constexpr int kWarpSize = 32;

enum class BarrierOp { kSync, kOr, kAnd, kCount };
enum class WarpOp { kSync, kShfl, kShflUp, kShflDown, kShflXor, kBallot, kAny, kAll };

// What a thread brings to a warp operation. `value` is the bits of its operand (or its predicate),
// `lane` the lane it wants to hear from.
struct WarpRequest {
  WarpOp op = WarpOp::kSync;
  unsigned mask = 0;
  uint64_t value = 0;
  size_t value_size = 0;
  int lane = 0;
  Site site;
};

int barrier(BarrierOp op, int predicate, Site site);
uint64_t warp_operation(const WarpRequest& request);

// Turns the operand of a shuffle into a lane of the warp; faults where the hardware would answer
// with something nobody asked for.
int source_lane(WarpOp op, int operand, int width, Site site);

void launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body,
            Site site);

// Totals since the library was loaded, for tests that count.
struct Counters {
  uint64_t launches = 0, blocks = 0, barriers = 0, warp_operations = 0;
};

// Bytes that packs have moved, of csrc/block.cuh, which adds to them.
extern uint64_t bytes_read, bytes_written;
#define LSOFTMAX_COUNT_BYTES(total, bytes) ::emulation::total += (bytes)

// A launch configuration and where it was launched from: cudaLaunchKernelEx ends in a parameter
// pack, which leaves no room for a defaulted location of its own.
struct LaunchRequest {
  const cudaLaunchConfig_t* config;
  Site site;
  LaunchRequest(const cudaLaunchConfig_t* config_, const char* file = __builtin_FILE(),
                int line = __builtin_LINE())
      : config(config_), site{file, line} {}
};

}  // namespace emulation

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(emulation::LaunchRequest request, void (*kernel)(Params...),
                               Args&&... args) {
  const std::tuple<Params...> coerced(std::forward<Args>(args)...);
  emulation::launch(
      *request.config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, coerced); },
      request.site);
  return cudaSuccess;
}
