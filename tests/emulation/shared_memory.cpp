// The records of shared memory, and the two faults that they reveal: races, and reads of what
// nobody wrote.
#include "emulation/shared_memory.h"

#include <numeric>

#include "engine_state.h"

namespace emulation {
namespace {

Access this_access(Site site) {
  return {engine().clock, site, static_cast<uint16_t>(engine().current)};
}

[[noreturn]] void fault_race(size_t element, const char* what, const Access& earlier, Site site) {
  fault("shared memory race on element " + std::to_string(element) + ": " + what + " thread " +
            thread_name(earlier.thread) + " at " + to_string(earlier.site) +
            ", with no barrier in between",
        site);
}

}  // namespace

SharedMemory& dynamic_memory() {
  alignas(128) static unsigned char data[kSharedBytes];
  static SharedMemory memory(data, 0, 0);
  return memory;
}

void fault_out_of_bounds(ptrdiff_t index, ptrdiff_t size, Site site) {
  fault("shared memory index " + std::to_string(index) + " is out of bounds: there are " +
            std::to_string(size) + " elements",
        site);
}

void SharedMemory::resize(size_t bytes, size_t unit) {
  bytes_ = bytes;
  unit_ = unit;
  if (unit != 0 && records_.size() < bytes / unit) records_.resize(bytes / unit);
}

void SharedMemory::view_as(size_t size) {
  const size_t unit = std::gcd(unit_, size);
  if (unit == unit_) return;
  if (unit_ != 0) {
    std::vector<Record> finer(bytes_ / unit);
    for (size_t i = 0; i < bytes_ / unit_ * unit_ / unit; ++i)
      finer[i] = records_[i * unit / unit_];
    records_ = std::move(finer);
  }
  resize(bytes_, unit);
}

// A static array is known by its first use in a block, and that is when its size counts.
void SharedMemory::touch(Site site) {
  Engine& e = engine();
  if (last_block_ == e.block_start) return;
  last_block_ = e.block_start;
  if (this == &dynamic_memory()) return;
  e.static_shared += bytes_;
  if (e.static_shared > kStaticSharedBytes ||
      e.static_shared + dynamic_memory().bytes() > kSharedBytes) {
    fault("too much shared memory: " + std::to_string(e.static_shared) + " bytes static (limit " +
              std::to_string(kStaticSharedBytes) + ") and " +
              std::to_string(dynamic_memory().bytes()) + " dynamic (limit for both " +
              std::to_string(kSharedBytes) + ")",
          site);
  }
}

// Keeps the latest read of each thread, but of one warp only and of one thread of another: once two
// warps have read since the last barrier any write is a race, and which other threads read makes no
// difference.
void SharedMemory::note_read(Record& record, const Access& access) {
  auto& reads = record.reads;
  if (!reads.empty() && reads.back().time < engine().last_barrier) reads.clear();
  if (!reads.empty()) {
    if (reads.back().thread / kWarpSize != reads.front().thread / kWarpSize) return;
    for (Access& earlier : reads) {
      if (earlier.thread == access.thread) {
        earlier = access;
        return;
      }
    }
  }
  reads.push_back(access);
}

void SharedMemory::read(size_t offset, void* value, size_t size, Site site) {
  touch(site);
  const Access now = this_access(site);
  for (size_t i = offset / unit_; i < (offset + size) / unit_; ++i) {
    Record& record = records_[i];
    if (record.write.time < engine().block_start) {
      fault("read of uninitialised shared memory, element " + std::to_string(offset / size) +
                ": nobody has written it yet",
            site);
    }
    if (!ordered(record.write))
      fault_race(offset / size, "read here, written by", record.write, site);
    note_read(record, now);
  }
  std::memcpy(value, data_ + offset, size);
}

void SharedMemory::write(size_t offset, const void* value, size_t size, Site site) {
  touch(site);
  const Access now = this_access(site);
  for (size_t i = offset / unit_; i < (offset + size) / unit_; ++i) {
    Record& record = records_[i];
    if (!ordered(record.write))
      fault_race(offset / size, "written here and by", record.write, site);
    for (const Access& read : record.reads) {
      if (!ordered(read)) fault_race(offset / size, "written here, read by", read, site);
    }
    record.reads.clear();
    record.write = now;
  }
  std::memcpy(data_ + offset, value, size);
}

}  // namespace emulation
