// Block barriers and warp operations. The last thread to arrive completes one for all that take
// part.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "engine_state.h"

namespace emulation {
namespace {

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

const char* name(WarpOp op) {
  constexpr const char* kNames[] = {"__syncwarp",       "__shfl_sync",     "__shfl_up_sync",
                                    "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
                                    "__any_sync",       "__all_sync"};
  return kNames[static_cast<int>(op)];
}

std::string describe(const WarpRequest& request) {
  char mask[16];
  std::snprintf(mask, sizeof mask, "0x%08x", request.mask);
  return name(request.op) + std::string(" with mask ") + mask;
}

std::string describe(unsigned id) {
  const Thread& thread = *engine().threads[id];
  const std::string who = "thread " + thread_name(id);
  switch (thread.state) {
    case State::kExited:
      return who + " has exited";
    case State::kAtBarrier:
      return who + " waits at the block barrier at " + to_string(thread.barrier_site);
    case State::kAtMbarrier:
      return who + " waits for an mbarrier at " + to_string(thread.barrier_site);
    case State::kInWarpOp:
      return who + " is in " + describe(thread.request) + " at " + to_string(thread.request.site);
    case State::kReady:
      break;
  }
  return who + " has yet to run";
}

void wait(State state) {
  engine().thread().state = state;
  Fiber::suspend();
}

// What the threads at a __syncwarp did before it comes before what any of them does after it.
void exchange_knowledge(Thread* const* lanes) {
  const uint64_t now = ++engine().clock;
  uint64_t known[kWarpSize] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes[lane] == nullptr) continue;
    lanes[lane]->knows[lane] = now;
    for (int i = 0; i < kWarpSize; ++i) known[i] = std::max(known[i], lanes[lane]->knows[i]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes[lane] != nullptr) std::copy(known, known + kWarpSize, lanes[lane]->knows);
  }
}

uint64_t shuffled(const WarpRequest& request, Thread* const* lanes) {
  if (lanes[request.lane] == nullptr) {
    fault(describe(request) + " reads lane " + std::to_string(request.lane) +
              ", which is not in the mask",
          request.site);
  }
  return lanes[request.lane]->request.value;
}

// All lanes of the mask have arrived.
void complete(const WarpRequest& request) {
  Engine& e = engine();
  const unsigned first = e.current / kWarpSize * kWarpSize;
  Thread* lanes[kWarpSize] = {};
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(request.mask >> lane & 1)) continue;
    lanes[lane] = e.threads[first + lane].get();
    const WarpRequest& other = lanes[lane]->request;
    if (other.op != request.op || other.mask != request.mask ||
        other.value_size != request.value_size || !same(other.site, request.site)) {
      fault("divergent warp operation: " + describe(request) + ", while " + describe(first + lane),
            request.site);
    }
    if (other.value != 0) ballot |= 1u << lane;
  }
  if (request.op == WarpOp::kSync) exchange_knowledge(lanes);
  for (Thread* thread : lanes) {
    if (thread == nullptr) continue;
    switch (request.op) {
      case WarpOp::kSync:
        break;
      case WarpOp::kBallot:
        thread->result = ballot;
        break;
      case WarpOp::kAny:
        thread->result = ballot != 0;
        break;
      case WarpOp::kAll:
        thread->result = ballot == request.mask;
        break;
      default:
        thread->result = shuffled(thread->request, lanes);
    }
    thread->state = State::kReady;
  }
  e.warps[first / kWarpSize].waiting &= ~request.mask;
  ++e.counters.warp_operations;
}

}  // namespace

int source_lane(WarpOp op, int operand, int width, Site site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fault(std::string(name(op)) + " with width " + std::to_string(width) +
              ": expected a power of two up to 32",
          site);
  }
  const int lane = engine().current % kWarpSize;
  const int first = lane & ~(width - 1);
  if (op == WarpOp::kShfl || op == WarpOp::kShflXor) {
    if (operand < 0 || operand >= width) {
      fault(std::string(name(op)) + ": lane " + std::to_string(operand) +
                " is out of range for width " + std::to_string(width),
            site);
    }
    return op == WarpOp::kShfl ? first + operand : lane ^ operand;
  }
  // Up and down are defined beyond the ends: a lane with no such neighbour hears itself.
  if (operand < 0 || operand >= width) return lane;
  const int source = op == WarpOp::kShflUp ? lane - operand : lane + operand;
  return source < first || source >= first + width ? lane : source;
}

uint64_t warp_operation(const WarpRequest& request) {
  Engine& e = engine();
  Thread& thread = e.thread();
  Warp& warp = e.warps[e.current / kWarpSize];
  if (!(request.mask & lane_bit(e.current))) {
    fault(describe(request) + ": the mask omits the calling lane " +
              std::to_string(e.current % kWarpSize),
          request.site);
  }
  if (const unsigned gone = request.mask & (~warp.exist | warp.exited)) {
    fault(describe(request) + ": lane " + std::to_string(__builtin_ctz(gone)) +
              (gone & -gone & warp.exist ? " has exited" : " does not exist"),
          request.site);
  }
  thread.request = request;
  thread.state = State::kInWarpOp;
  warp.waiting |= lane_bit(e.current);
  if ((warp.waiting & request.mask) == request.mask) {
    complete(request);
  } else {
    wait(State::kInWarpOp);
  }
  return thread.result;
}

int barrier(BarrierOp op, int predicate, Site site) {
  Engine& e = engine();
  Thread& thread = e.thread();
  if (e.arrived == 0) {
    e.barrier_op = op;
    e.barrier_site = site;
    e.votes = 0;
  } else if (op != e.barrier_op || !same(site, e.barrier_site)) {
    fault("divergent barrier: other threads wait at " + to_string(e.barrier_site), site);
  }
  e.votes += predicate != 0;
  thread.barrier_site = site;
  if (++e.arrived < e.thread_count) {
    wait(State::kAtBarrier);
    return static_cast<int>(thread.result);
  }
  const unsigned count = e.votes;
  const unsigned result = op == BarrierOp::kOr    ? count != 0
                          : op == BarrierOp::kAnd ? count == e.thread_count
                                                  : count;
  for (unsigned id = 0; id < e.thread_count; ++id) {
    e.threads[id]->result = result;
    e.threads[id]->state = State::kReady;
  }
  e.arrived = 0;
  e.last_barrier = ++e.clock;
  ++e.counters.barriers;
  return static_cast<int>(result);
}

void fault_stuck() {
  Engine& e = engine();
  for (unsigned id = 0; id < e.thread_count; ++id) {
    if (e.threads[id]->state != State::kAtMbarrier) continue;
    e.current = id;
    fault("deadlock: the phase of this mbarrier does not end", e.threads[id]->barrier_site);
  }
  for (unsigned id = 0; id < e.thread_count; ++id) {
    if (e.threads[id]->state != State::kInWarpOp) continue;
    e.current = id;
    const WarpRequest& request = e.threads[id]->request;
    const unsigned first = id / kWarpSize * kWarpSize;
    // Somebody named in the mask is elsewhere, or is at a warp operation with a mask of its own.
    for (unsigned other = first; other < first + kWarpSize; ++other) {
      if (!(request.mask & lane_bit(other))) continue;
      const Thread& thread = *e.threads[other];
      if (thread.state == State::kInWarpOp && thread.request.mask == request.mask) continue;
      fault("divergent warp operation: " + describe(request) + " waits, but " + describe(other),
            request.site);
    }
  }
  unsigned waiting = 0, other = 0;
  while (e.threads[waiting]->state != State::kAtBarrier) ++waiting;
  while (e.threads[other]->state == State::kAtBarrier) ++other;
  e.current = waiting;
  fault("divergent barrier: " + std::to_string(e.arrived) + " of " +
            std::to_string(e.thread_count) + " threads wait, but " + describe(other),
        e.threads[waiting]->barrier_site);
}

bool ordered(const Access& earlier) {
  const Engine& e = engine();
  if (earlier.time < e.last_barrier || earlier.thread == e.current) return true;
  return earlier.thread / kWarpSize == e.current / kWarpSize &&
         earlier.time < e.threads[e.current]->knows[earlier.thread % kWarpSize];
}

}  // namespace emulation
