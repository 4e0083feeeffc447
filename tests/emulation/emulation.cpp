// Launches: checks the configuration, then runs the threads of each block until all have exited.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "engine_state.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulation {

uint64_t bytes_read = 0, bytes_written = 0;

namespace {

std::string format(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

// The name is known where the symbol is exported: a kernel in an anonymous namespace goes without.
std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "";
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = demangled != nullptr ? demangled : info.dli_sname;
  std::free(demangled);
  return ", in " + name;
}

// The fiber of every thread runs this once a block.
void run_thread() {
  Engine& e = engine();
  const unsigned id = e.current;
  try {
    (*e.body)();
  } catch (...) {
    e.error = std::current_exception();
  }
  e.threads[id]->state = State::kExited;
  e.warps[id / kWarpSize].exited |= lane_bit(id);
  ++e.exited;
}

bool reversed = false;
bool stubbed = false;

unsigned ith(unsigned i, unsigned count) { return reversed ? count - 1 - i : i; }

// Lets the threads of one warp run until each waits for the block or has exited. Returns whether
// any could.
bool run_warp(unsigned first) {
  Engine& e = engine();
  const unsigned count = std::min<unsigned>(kWarpSize, e.thread_count - first);
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned id = first + ith(i, count);
      Thread& thread = *e.threads[id];
      if (thread.state != State::kReady) continue;
      e.current = id;
      threadIdx = thread.index;
      thread.fiber.resume();
      if (e.error) std::rethrow_exception(e.error);
      again = progress = true;
    }
  }
  return progress;
}

void run_block() {
  Engine& e = engine();
  e.block_start = e.last_barrier = ++e.clock;
  e.static_shared = e.arrived = e.exited = 0;
  for (Warp& warp : e.warps) warp = Warp();
  for (unsigned id = 0; id < e.thread_count; ++id) {
    e.threads[id]->state = State::kReady;
    e.warps[id / kWarpSize].exist |= lane_bit(id);
  }
  const unsigned warps = (e.thread_count + kWarpSize - 1) / kWarpSize;
  while (e.exited < e.thread_count) {
    bool progress = false;
    for (unsigned i = 0; i < warps; ++i) progress = run_warp(ith(i, warps) * kWarpSize) || progress;
    if (!progress) fault_stuck();
  }
  ++e.counters.blocks;
}

void check_configuration(const cudaLaunchConfig_t& config, const void* kernel, Site site) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto refuse = [&](const std::string& what) { fault("invalid launch: " + what, site); };
  const std::string grid_text = "gridDim " + format(grid.x, grid.y, grid.z);
  const std::string block_text = "blockDim " + format(block.x, block.y, block.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse(grid_text + " is empty");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse(grid_text + " exceeds (2^31-1,65535,65535)");
  }
  if (block.x == 0 || block.y == 0 || block.z == 0) refuse(block_text + " is empty");
  if (block.x > 1024 || block.y > 1024 || block.z > 64 ||
      uint64_t{block.x} * block.y * block.z > kMaxThreads) {
    refuse(block_text + " exceeds 1024 threads or (1024,1024,64)");
  }

  const size_t bytes = config.dynamicSmemBytes;
  const auto& limits = engine().dynamic_limit;
  const auto limit = limits.find(kernel);
  const size_t opted = limit == limits.end() ? 0 : limit->second;
  const std::string request = std::to_string(bytes) + " bytes of dynamic shared memory";
  if (bytes > kSharedBytes) refuse(request + ", the device has " + std::to_string(kSharedBytes));
  if (bytes > std::max(opted, kStaticSharedBytes)) {
    refuse(request + ", but the kernel did not opt in to more than " +
           std::to_string(std::max(opted, kStaticSharedBytes)) +
           " (cudaFuncAttributeMaxDynamicSharedMemorySize)");
  }
}

void prepare_threads(dim3 block) {
  Engine& e = engine();
  e.thread_count = block.x * block.y * block.z;
  while (e.threads.size() < e.thread_count) {
    e.threads.push_back(std::make_unique<Thread>(run_thread));
  }
  for (unsigned id = 0; id < e.thread_count; ++id) {
    e.threads[id]->index = {id % block.x, id / block.x % block.y, id / block.x / block.y};
  }
}

// Leaves the engine fit for the next launch, however this one ends.
struct Running {
  Running() { engine().running = true; }
  ~Running() {
    Engine& e = engine();
    e.running = false;
    e.error = nullptr;
    for (auto& thread : e.threads) {
      if (!thread->fiber.at_rest()) thread->fiber.restart();
    }
  }
};

}  // namespace

// Never destroyed: a process may end while fibers are suspended.
Engine& engine() {
  static Engine& instance = *new Engine;
  return instance;
}

std::string thread_name(unsigned thread) {
  const uint3 at = engine().threads[thread]->index;
  return format(at.x, at.y, at.z);
}

std::string to_string(Site site) { return site.file + (":" + std::to_string(site.line)); }

void fault(const std::string& what, Site site) {
  const Engine& e = engine();
  std::string text = what + ", " + to_string(site);
  if (e.running) {
    text += ", block " + format(blockIdx.x, blockIdx.y, blockIdx.z) + ", thread " +
            thread_name(e.current);
  }
  throw std::runtime_error(text + kernel_name(e.kernel));
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(engine().mutex);
  engine().dynamic_limit[kernel] = bytes;
}

void launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body,
            Site site) {
  Engine& e = engine();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.kernel = kernel;
  e.body = &body;
  check_configuration(config, kernel, site);
  if (stubbed) {
    ++e.counters.launches;
    return;
  }
  prepare_threads(config.blockDim);
  dynamic_memory().resize(config.dynamicSmemBytes, 0);
  ++e.counters.launches;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  const Running running;
  const uint64_t plane = uint64_t{gridDim.x} * gridDim.y, blocks = plane * gridDim.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = reversed ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(block % gridDim.x),
                static_cast<unsigned>(block % plane / gridDim.x),
                static_cast<unsigned>(block / plane)};
    run_block();
  }
}

}  // namespace emulation

// For ctypes, as all of the rest. From now on blocks, warps and lanes take their turns last to
// first.
extern "C" void emulation_set_reversed(int value) {
  const std::lock_guard<std::mutex> lock(emulation::engine().mutex);
  emulation::reversed = value != 0;
}

// From now on a launch is checked and counted, and runs nothing: what is left is the host's time.
extern "C" void emulation_set_stubbed(int value) {
  const std::lock_guard<std::mutex> lock(emulation::engine().mutex);
  emulation::stubbed = value != 0;
}

// Launches, blocks, barriers, warp operations, bytes read and written since the library was loaded.
extern "C" void emulation_counters(uint64_t* out) {
  const emulation::Counters& counters = emulation::engine().counters;
  out[0] = counters.launches;
  out[1] = counters.blocks;
  out[2] = counters.barriers;
  out[3] = counters.warp_operations;
  out[4] = emulation::bytes_read;
  out[5] = emulation::bytes_written;
}
