// What the two halves of the Hopper emulation share: shared memory as the copy engine and the
// tensor cores see it.
#pragma once

#include <map>

#include "emulation/hopper.h"
#include "engine_state.h"

namespace emulation {

using lsoftmax::hopper::Barrier;

constexpr unsigned kGroupThreads = 128;  // of a warpgroup

struct Range {
  uint32_t begin, end;
  bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
};

struct Copy {
  Range to;
  const Barrier* barrier;
  uint64_t phase;  // of the barrier, that lasts until the copy has been made
};

// Addresses have 18 bits. Forgotten from block to block.
struct AsyncMemory {
  unsigned char bytes[1 << 18];
  std::vector<Copy> copies;  // the last one to each place
  // By thread: phases of each barrier that it has seen the end of.
  std::map<const Barrier*, uint64_t> seen[kMaxThreads];
};

AsyncMemory& async_memory();

// The threads of a warp meet, as an instruction that is ".sync.aligned" wants it. Orders nothing.
void converge(Site site);

// Faults where products under way, of any thread, may still read from `range`.
void check_unread(Range range, Site site);
// For a new block.
void forget_products();

// 128-byte swizzle: bits 4 to 6 of an address, which of eight 16-byte pieces, are changed by bits 7
// to 9, which of eight rows.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace emulation
