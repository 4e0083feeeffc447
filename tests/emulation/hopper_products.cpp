// The products of a warpgroup, out of swizzled tiles in shared memory into the sums of 128 threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>

#include "hopper_state.h"

namespace emulation {
namespace {

constexpr int kRows = 64, kColumns = 256, kDepth = 16, kSums = 128;

// A matrix in shared memory, as a 64-bit descriptor tells of it.
struct Operand {
  uint32_t start, eight_rows;

  Operand(uint64_t descriptor, Site site)
      : start((descriptor & 0x3fff) << 4), eight_rows((descriptor >> 32 & 0x3fff) << 4) {
    const unsigned base_offset = descriptor >> 49 & 7, swizzle = descriptor >> 62;
    if (swizzle != 1) fault("wgmma: only tiles with the 128-byte swizzle are emulated", site);
    if (descriptor >> 14 & 3 || descriptor >> 30 & 3 || descriptor >> 46 & 7 ||
        descriptor >> 52 & 0x3ff) {
      fault("wgmma: reserved bits of a descriptor are set", site);
    }
    // The pattern must begin at a multiple of 1024, or the base offset say where.
    if (base_offset != 0 || (start >> 7 & 7) != 0) fault("wgmma: tile between two patterns", site);
    if (start % 128 + kDepth * 2 > 128) fault("wgmma: columns beyond those of the tile", site);
  }
  Range range(int rows) const {
    return {start / 128 * 128, start / 128 * 128 + (rows / 8 - 1) * eight_rows + 1024};
  }
  float operator()(int row, int column) const {
    const uint32_t at = start + row / 8 * eight_rows + row % 8 * 128 + column * 2;
    uint16_t bits;
    std::memcpy(&bits, async_memory().bytes + swizzled(at), 2);
    return from_bfloat16(bits);
  }
};

struct Product {
  uint64_t a, b;
  uint64_t number;  // of the thread's in this block
};

struct Multiplier {
  bool begun = false;
  float (*sums)[kSums] = nullptr;  // what the products under way are for
  float real[kSums];               // meanwhile
  std::vector<Product> open, committed;
  uint64_t asked = 0;
};

// Operands as floats, kept because 128 threads want the same.
struct Read {
  uint64_t number = std::numeric_limits<uint64_t>::max();
  float a[kRows][kDepth], b[kColumns][kDepth];
};
constexpr int kReads = 64;

Multiplier multipliers[kMaxThreads];
std::vector<Product> asked[kMaxThreads / kGroupThreads];  // by the first thread of a warpgroup
Read reads[kMaxThreads / kGroupThreads][kReads];

Multiplier& self() { return multipliers[engine().current]; }

void compute(Multiplier& thread, const Product& product) {
  const unsigned id = engine().current, t = id % kGroupThreads;
  Read& read = reads[id / kGroupThreads][product.number % kReads];
  if (read.number != product.number) {
    const Operand a(product.a, {}), b(product.b, {});
    for (int k = 0; k < kDepth; ++k) {
      for (int row = 0; row < kRows; ++row) read.a[row][k] = a(row, k);
      for (int row = 0; row < kColumns; ++row) read.b[row][k] = b(row, k);
    }
    read.number = product.number;
  }
  // The manual's figure of D's fragment: a warp has 16 rows, a group of four lanes a row of the
  // first eight and the one eight below; pairs of columns go round the four lanes.
  const int warp = t / 32, group = t % 32 / 4, in_group = t % 4;
  for (int i = 0; i < kSums; ++i) {
    const bool lower_half = (i & 2) != 0;
    const int row = 16 * warp + group + (lower_half ? 8 : 0);
    const int column = (i >> 2) * 8 + in_group * 2 + (i & 1);
    float sum = 0;
    for (int k = 0; k < kDepth; ++k) sum += read.a[row][k] * read.b[column][k];
    thread.real[i] += sum;
  }
}

void check_copied(Range range, Site site) {
  AsyncMemory& memory = async_memory();
  uint32_t covered = 0;
  for (const Copy& copy : memory.copies) {
    if (!copy.to.overlaps(range)) continue;
    covered += std::min(copy.to.end, range.end) - std::max(copy.to.begin, range.begin);
    const auto& seen = memory.seen[engine().current];
    const auto found = seen.find(copy.barrier);
    if (found == seen.end() || found->second <= copy.phase) {
      fault("wgmma: reads a tile that the thread has not waited for", site);
    }
  }
  if (covered != range.end - range.begin) fault("wgmma: reads what nobody has copied", site);
}

}  // namespace

void check_unread(Range range, Site site) {
  const auto check = [&](unsigned id, const Product& product) {
    if (Operand(product.a, site).range(kRows).overlaps(range) ||
        Operand(product.b, site).range(kColumns).overlaps(range)) {
      fault("copy over a tile that products of thread " + thread_name(id) + " may still read",
            site);
    }
  };
  for (unsigned id = 0; id < engine().thread_count; ++id) {
    for (const Product& product : multipliers[id].open) check(id, product);
    for (const Product& product : multipliers[id].committed) check(id, product);
  }
}

void forget_products() {
  for (Multiplier& thread : multipliers) thread = Multiplier();
  for (auto& products : asked) products.clear();
  for (auto& group : reads) {
    for (Read& read : group) read.number = std::numeric_limits<uint64_t>::max();
  }
}

}  // namespace emulation

namespace lsoftmax::hopper {

using namespace emulation;

void multiply_begin(const char* file, int line) {
  converge({file, line});
  async_memory();  // a new block begins with nothing under way
  self().begun = true;
}

void multiply(float (&sums)[128], uint64_t a, uint64_t b, const char* file, int line) {
  const Site site{file, line};
  converge(site);
  Multiplier& thread = self();
  if (!thread.begun) fault("wgmma: no fence since the sums were last touched", site);
  check_copied(Operand(a, site).range(kRows), site);
  check_copied(Operand(b, site).range(kColumns), site);
  auto& known = asked[engine().current / kGroupThreads];
  const Product product{a, b, thread.asked++};
  if (known.size() == product.number) known.push_back(product);
  if (known[product.number].a != a || known[product.number].b != b) {
    fault("wgmma: threads of a warpgroup ask for different products", site);
  }
  if (thread.sums == nullptr) {
    thread.sums = &sums;
    std::copy(sums, sums + kSums, thread.real);
    std::fill(sums, sums + kSums, NAN);
  }
  if (thread.sums != &sums) fault("wgmma: products for two sets of sums at a time", site);
  thread.open.push_back(product);
}

void multiply_commit(const char* file, int line) {
  converge({file, line});
  auto& open = self().open;
  std::copy(open.begin(), open.end(), std::back_inserter(self().committed));
  open.clear();
}

void multiply_finish(float (&sums)[128], const char* file, int line) {
  Multiplier& thread = self();
  if (!thread.open.empty()) fault("wgmma: products that no group was closed of", {file, line});
  for (const Product& product : thread.committed) compute(thread, product);
  thread.committed.clear();
  converge({file, line});  // what one lane does next comes after what all have read
  if (thread.sums == &sums) std::copy(thread.real, thread.real + kSums, sums);
  thread.sums = nullptr;
  thread.begun = false;
}

void check_registers(int count, const char* file, int line) {
  converge({file, line});
  if (count < 24 || count > 256 || count % 8 != 0) {
    fault("setmaxnreg: expected a multiple of 8 from 24 to 256", {file, line});
  }
}

float exp2_fast(float v) {
  const float result = std::exp2(v);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;
}

uint32_t pack_bfloat16(float first, float second) {
  const auto narrow = [](float value) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  };
  return narrow(first) | narrow(second) << 16;
}

}  // namespace lsoftmax::hopper
