// The functions of csrc/hopper.cuh on the CPU, written after the PTX manual and not after that
// file.
//
// What runs by itself on a device is put off here, or done early, whichever hurts more: products
// are computed when a thread waits for them, and until then its sums are NaN; copies are made when
// they are asked for or, after emulation_set_late_copies(1), when somebody waits for them. Reported
// as faults, besides what the manual forbids:
//
// - a barrier used by another thread before a block barrier, or not published to the copy engine,
//   and one that more threads arrive at than it counts
// - a copy over memory that products under way may still read
// - products out of memory whose copy the calling thread has not waited for
// - threads of a warpgroup that ask for different products
// - threads that wait for a barrier nobody completes
#pragma once

#include <cstdint>
#include <vector>

#include "emulation/engine.h"
#include "emulation/fault.h"
#include "emulation/shared_memory.h"

struct alignas(64) CUtensorMap {
  const uint16_t* data;
  uint64_t rows, columns, row_bytes;
  uint32_t box_rows, box_columns;
  unsigned char opaque[80];
};
static_assert(sizeof(CUtensorMap) == 128);

namespace lsoftmax::hopper {

// Where a block's dynamic shared memory begins: at a multiple of 16 and of no more.
constexpr uint32_t kDynamicAddress = 0x430;

struct Barrier {
  emulation::Access made;  // by whom, and when
  uint64_t number = 0;     // of all initialisations
  unsigned arrivals = 0, pending = 0;
  int64_t bytes = 0;   // expected in this phase, less those that came
  uint64_t phase = 0;  // how many have ended
  std::vector<unsigned> waiters;
};

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

using ::dynamic_shared;
inline uint32_t dynamic_address() { return kDynamicAddress; }

void initialise(Barrier& barrier, unsigned arrivals, EMULATION_SITE);
void publish_barriers();
void arrive(Barrier& barrier, EMULATION_SITE);
void arrive_expecting(Barrier& barrier, unsigned bytes, EMULATION_SITE);
void wait(Barrier& barrier, unsigned parity, EMULATION_SITE);

void load_tile(uint32_t address, const CUtensorMap& map, int row, int column, Barrier& barrier,
               EMULATION_SITE);

void multiply_begin(EMULATION_SITE);
void multiply(float (&sums)[128], uint64_t a, uint64_t b, EMULATION_SITE);
void multiply_commit(EMULATION_SITE);
void multiply_finish(float (&sums)[128], EMULATION_SITE);

void check_registers(int count, EMULATION_SITE);
template <int kRegisters>
void lower_registers(EMULATION_SITE) {
  check_registers(kRegisters, file, line);
}
template <int kRegisters>
void raise_registers(EMULATION_SITE) {
  check_registers(kRegisters, file, line);
}

#undef EMULATION_SITE

float exp2_fast(float v);
uint32_t pack_bfloat16(float first, float second);

}  // namespace lsoftmax::hopper
