// Barriers in shared memory, and the engine that copies tiles into it.
#include <cuda.h>

#include <algorithm>

#include "hopper_state.h"

namespace emulation {
namespace {

struct PutOff {
  Copy copy;
  CUtensorMap map;
  int row, column;
};

bool late_copies = false;
uint64_t initialisations = 0, published = 0;
std::vector<PutOff> put_off;
std::vector<unsigned> gave_way;  // threads that let others go first

void check_barrier(const Barrier& barrier, Site site) {
  if (barrier.made.time < engine().block_start) fault("mbarrier is not initialised", site);
  if (!ordered(barrier.made)) {
    fault("mbarrier initialised by thread " + thread_name(barrier.made.thread) +
              " with no block barrier in between",
          site);
  }
}

// Ends the phase if everything has come. Returns whether somebody waited for that.
bool progress(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return false;
  const bool awaited = !barrier.waiters.empty();
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (const unsigned id : barrier.waiters) engine().threads[id]->state = State::kReady;
  barrier.waiters.clear();
  return awaited;
}

void suspend(Site site) {
  engine().thread().barrier_site = site;
  engine().thread().state = State::kAtMbarrier;
  Fiber::suspend();
}

void make(const PutOff& work) {
  const CUtensorMap& map = work.map;
  unsigned char* memory = async_memory().bytes;
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    for (uint32_t c = 0; c < map.box_columns; ++c) {
      const int64_t row = int64_t{work.row} + r, column = int64_t{work.column} + c;
      const bool inside = row >= 0 && column >= 0 && static_cast<uint64_t>(row) < map.rows &&
                          static_cast<uint64_t>(column) < map.columns;
      const uint16_t value = inside ? map.data[row * (map.row_bytes / 2) + column] : 0;
      std::memcpy(memory + swizzled(work.copy.to.begin + (r * map.box_columns + c) * 2), &value, 2);
    }
  }
  auto& barrier = const_cast<Barrier&>(*work.copy.barrier);
  barrier.bytes -= work.copy.to.end - work.copy.to.begin;
  progress(barrier);
}

void make_put_off(const Barrier& barrier) {
  std::vector<PutOff> now;
  const auto concerned = [&](const PutOff& work) { return work.copy.barrier == &barrier; };
  std::copy_if(put_off.begin(), put_off.end(), std::back_inserter(now), concerned);
  put_off.erase(std::remove_if(put_off.begin(), put_off.end(), concerned), put_off.end());
  for (const PutOff& work : now) make(work);
}

}  // namespace

AsyncMemory& async_memory() {
  static AsyncMemory& memory = *new AsyncMemory;
  static uint64_t block = 0;
  if (block != engine().block_start) {
    block = engine().block_start;
    std::memset(memory.bytes, 0xff, sizeof memory.bytes);  // NaN
    memory.copies.clear();
    for (auto& seen : memory.seen) seen.clear();
    put_off.clear();
    gave_way.clear();
    forget_products();
  }
  return memory;
}

void converge(Site site) { warp_operation({WarpOp::kAll, 0xffffffffu, 1, 0, 0, site}); }

}  // namespace emulation

extern "C" void emulation_set_late_copies(int value) { emulation::late_copies = value != 0; }

namespace lsoftmax::hopper {

using namespace emulation;

void initialise(Barrier& barrier, unsigned arrivals, const char* file, int line) {
  if (arrivals == 0 || arrivals > (1u << 20) - 1)
    fault("mbarrier: 1 to 2^20-1 arrivals", {file, line});
  barrier = Barrier();
  barrier.made = {engine().clock, {file, line}, static_cast<uint16_t>(engine().current)};
  barrier.arrivals = barrier.pending = arrivals;
  barrier.number = ++initialisations;
}

void publish_barriers() { published = initialisations; }

void arrive(Barrier& barrier, const char* file, int line) {
  check_barrier(barrier, {file, line});
  if (barrier.pending == 0) fault("mbarrier: more arrivals than it counts", {file, line});
  --barrier.pending;
  if (!progress(barrier)) return;
  // Whoever waited goes first: what this thread should have done before it arrived is not yet done.
  gave_way.push_back(engine().current);
  suspend({file, line});
}

void arrive_expecting(Barrier& barrier, unsigned bytes, const char* file, int line) {
  if (bytes > (1u << 20) - 1) fault("mbarrier: at most 2^20-1 bytes", {file, line});
  barrier.bytes += bytes;
  arrive(barrier, file, line);
}

void wait(Barrier& barrier, unsigned parity, const char* file, int line) {
  check_barrier(barrier, {file, line});
  if (parity > 1) fault("mbarrier: parity is 0 or 1", {file, line});
  AsyncMemory& memory = async_memory();
  Engine& e = engine();
  const unsigned id = e.current;
  while ((barrier.phase & 1) == parity) {
    make_put_off(barrier);
    if ((barrier.phase & 1) != parity) break;
    barrier.waiters.push_back(id);
    suspend({file, line});
    for (const unsigned other : gave_way) e.threads[other]->state = State::kReady;
    gave_way.clear();
  }
  memory.seen[id][&barrier] = barrier.phase;
}

void load_tile(uint32_t address, const CUtensorMap& map, int row, int column, Barrier& barrier,
               const char* file, int line) {
  const Site site{file, line};
  check_barrier(barrier, site);
  if (barrier.number > published) fault("mbarrier is not published to the copy engine", site);
  const Range to{address, address + map.box_rows * map.box_columns * 2};
  if (address % 1024 != 0) fault("tile at an address that is not a multiple of 1024", site);
  if (to.end > kDynamicAddress + dynamic_memory().bytes()) {
    fault("tile beyond the end of shared memory", site);
  }
  AsyncMemory& memory = async_memory();
  check_unread(to, site);
  for (const PutOff& work : put_off) {
    if (work.copy.to.overlaps(to)) fault("two copies to one place at a time", site);
  }
  auto& copies = memory.copies;
  copies.erase(std::remove_if(copies.begin(), copies.end(),
                              [&](const Copy& copy) { return copy.to.overlaps(to); }),
               copies.end());
  copies.push_back({to, &barrier, barrier.phase});
  put_off.push_back({copies.back(), map, row, column});
  if (!late_copies || !barrier.waiters.empty()) make_put_off(barrier);
}

}  // namespace lsoftmax::hopper

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* size, const cuuint64_t* row_bytes,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool right =
      reinterpret_cast<uintptr_t>(map) % 64 == 0 && type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
      rank == 2 && reinterpret_cast<uintptr_t>(address) % 16 == 0 && size[0] > 0 && size[1] > 0 &&
      size[0] <= 1ull << 32 && size[1] <= 1ull << 32 && row_bytes[0] % 16 == 0 &&
      row_bytes[0] < 1ull << 40 && row_bytes[0] >= size[0] * 2 && box[0] > 0 && box[1] > 0 &&
      box[0] <= 256 && box[1] <= 256 && box[0] * 2 % 16 == 0 &&
      swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 == 128 && steps[0] == 1 && steps[1] == 1;
  if (!right) return CUDA_ERROR_INVALID_VALUE;
  *map = CUtensorMap{
      static_cast<const uint16_t*>(address), size[1], size[0], row_bytes[0], box[1], box[0], {}};
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
