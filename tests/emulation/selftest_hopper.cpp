// Kernels for the emulation of Hopper: one that is right, and the same with one fault each, on the
// line that ends in "FAULT: <case>". tests/test_hopper_emulation.py runs them by name.
#include <cuda.h>

#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace lsoftmax::hopper;

constexpr int kRows = 64, kColumns = 256, kDepth = 64, kProducer = 128, kThreads = 160;
constexpr uint32_t kTile = 1024 + 1024;  // where in memory: 64 rows of a, then 256 of b
constexpr uint32_t kBytes = (kRows + kColumns) * kDepth * 2;

struct Maps {
  CUtensorMap a, b;
};

// Start, distance of 8 rows (1024 bytes), 128-byte swizzle.
uint64_t descriptor(uint32_t address) {
  return uint64_t{address} >> 4 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// Thread 128 asks for the tiles, the warpgroup of the first 128 multiplies them. What differs in a
// faulty case is behind `is(case)`.
__global__ void product_kernel(Maps maps, float* out, std::string fault) {
  const auto is = [&](const char* name) { return fault == name; };
  static Barrier full;
  const unsigned t = threadIdx.x;
  if (is("not_initialised")) arrive(full);  // FAULT: not_initialised
  if (t == 0) {
    initialise(full, 1);
    if (!is("not_published")) publish_barriers();
  }
  if (is("no_block_barrier") && t == 1) arrive(full);  // FAULT: no_block_barrier
  __syncthreads();
  if (t == kProducer) {
    const uint32_t at = kTile;
    arrive_expecting(full, is("wrong_bytes") ? kBytes + 16 : kBytes);
    if (is("too_many_arrivals")) arrive(full);                        // FAULT: too_many_arrivals
    if (is("misplaced")) load_tile(at + 512, maps.a, 0, 0, full);     // FAULT: misplaced
    if (is("beyond_memory")) load_tile(1 << 17, maps.a, 0, 0, full);  // FAULT: beyond_memory
    load_tile(at, maps.a, 0, 0, full);                                // FAULT: not_published
    load_tile(at + kRows * 128, maps.b, 0, 0, full);
  }
  if (t >= kProducer) return;
  if (!is("not_waited")) wait(full, 0);  // FAULT: wrong_bytes
  float sums[128];
  for (float& sum : sums) sum = 1.0f;
  if (!is("no_fence")) multiply_begin();
  for (uint32_t k = 0; k < kDepth; k += 16) {
    uint64_t a = descriptor(kTile + k * 2), b = descriptor(kTile + kRows * 128 + k * 2);
    if (is("no_swizzle")) a ^= uint64_t{1} << 62;
    if (is("between_patterns")) a += 128 >> 4;
    if (is("beyond_columns")) b += 112 >> 4;
    if (is("elsewhere")) b += 256 * 128 >> 4;
    if (is("different") && t / 32 == 2) a ^= 2;
    multiply(sums, a, b);  // FAULT: multiply
  }
  multiply_commit();
  if (is("overwritten") && t == 0) load_tile(kTile, maps.a, 0, 0, full);  // FAULT: overwritten
  if (!std::isnan(sums[5])) throw std::logic_error("sums before they are waited for");
  multiply_finish(sums);
  for (int i = 0; i < 128; ++i) {
    out[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + t % 4 * 2 + i % 2] =
        sums[i];
  }
}

uint16_t bfloat16(int small) { return static_cast<uint16_t>(pack_bfloat16(float(small), 0)); }

// 50 rows of a, 200 of b and 40 columns: the rest of the tiles must come as zeros.
void product(const char* fault) {
  constexpr int kARows = 50, kBRows = 200, kUsed = 40;
  alignas(16) static uint16_t a[kARows * kUsed], b[kBRows * kUsed];
  const auto value = [](int row, int k, int seed) { return (row * 7 + k * 3 + seed) % 13 - 6; };
  for (int i = 0; i < kARows * kUsed; ++i) a[i] = bfloat16(value(i / kUsed, i % kUsed, 1));
  for (int i = 0; i < kBRows * kUsed; ++i) b[i] = bfloat16(value(i / kUsed, i % kUsed, 5));
  Maps maps{};
  const auto encode = [](CUtensorMap* map, uint16_t* data, cuuint64_t rows, cuuint32_t box_rows) {
    const cuuint64_t size[] = {kUsed, rows}, row_bytes[] = {kUsed * 2};
    const cuuint32_t box[] = {kDepth, box_rows}, steps[] = {1, 1};
    if (cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, size, row_bytes, box,
                               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
      throw std::logic_error("cuTensorMapEncodeTiled refuses");
    }
  };
  encode(&maps.a, a, kARows, kRows);
  encode(&maps.b, b, kBRows, kColumns);
  std::vector<float> out(kRows * kColumns);
  constexpr size_t kDynamic = kTile + kBytes - kDynamicAddress;
  cudaFuncSetAttribute(product_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamic);
  const cudaLaunchConfig_t config{1, kThreads, kDynamic, nullptr, nullptr, 0};
  cudaLaunchKernelEx(&config, product_kernel, maps, out.data(), std::string(fault));
  for (int i = 0; i < kRows * kColumns; ++i) {
    const int row = i / kColumns, column = i % kColumns;
    int truth = 1;
    for (int k = 0; k < kUsed && row < kARows && column < kBRows; ++k) {
      truth += value(row, k, 1) * value(column, k, 5);
    }
    if (out[i] != static_cast<float>(truth)) throw std::logic_error("wrong product");
  }
}

}  // namespace

// What went wrong in a case, in words; empty where nothing did.
extern "C" const char* hopper_selftest_run(const char* fault) {
  static std::string message;
  message.clear();
  try {
    product(fault);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
