// What the parts of the engine share: the threads of the running block, and the order of events.
//
// One clock ticks at the start of a block, at each block barrier and at each __syncwarp. An access
// of shared memory notes the time; whether it comes before a later one follows from the time of the
// last block barrier or, within a warp, from what the two threads have learnt of each other by
// __syncwarp.
#pragma once

#include <cuda_runtime.h>

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulation {

enum class State { kReady, kInWarpOp, kAtBarrier, kAtMbarrier, kExited };

struct Thread {
  explicit Thread(void (*body)()) : fiber(body) {}
  Fiber fiber;
  uint3 index{};
  State state = State::kExited;
  WarpRequest request;
  Site barrier_site;
  uint64_t result = 0;
  // What each lane of the warp did before this time comes before whatever this thread does now.
  // Never reset: the clock only grows, so what is left of earlier blocks is too old to matter.
  uint64_t knows[kWarpSize] = {};
};

struct Warp {
  unsigned exist = 0, waiting = 0, exited = 0;  // lanes, as bits
};

struct Engine {
  std::mutex mutex;  // one launch at a time, whichever threads they come from
  std::vector<std::unique_ptr<Thread>> threads;
  Warp warps[kMaxThreads / kWarpSize];
  unsigned thread_count = 0, current = 0;
  bool running = false;

  const void* kernel = nullptr;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;

  BarrierOp barrier_op = BarrierOp::kSync;
  Site barrier_site;
  unsigned arrived = 0, exited = 0, votes = 0;

  uint64_t clock = 1, block_start = 1, last_barrier = 1;
  size_t static_shared = 0;
  Counters counters;
  std::map<const void*, size_t> dynamic_limit;

  Thread& thread() { return *threads[current]; }
};

Engine& engine();

inline unsigned lane_bit(unsigned thread) { return 1u << (thread % kWarpSize); }
std::string thread_name(unsigned thread);  // "(x,y,z)"

// Does `earlier` come before whatever the running thread does now?
bool ordered(const Access& earlier);

// No thread of the block can go on: throws what a device would hang on.
[[noreturn]] void fault_stuck();

}  // namespace emulation
