// What Hopper's tensor cores need beyond CUDA C++: named functions, and the only assembly here.
//
// A matrix product on Hopper is a pipeline of units that work by themselves and tell each other of
// it through barriers in shared memory:
//
// - The copy engine ("TMA") moves a rectangle of a matrix into shared memory. One thread asks for
//   it and goes on; the engine reports the bytes it has written to a barrier. What the matrix looks
//   like is in a CUtensorMap, which the host prepares. Outside the matrix the engine writes zeros,
//   so ragged ends need no code.
// - The tensor cores multiply straight out of shared memory. The 128 threads of a warpgroup (four
//   warps, the first a multiple of four) ask together, in "wgmma" instructions, and go on; the
//   products appear in their registers some time later. Until they have waited, neither those
//   registers nor the shared memory being read may be touched.
// - A barrier counts arrivals of threads and bytes of the copy engine. When both are complete its
//   phase ends and the next one begins with the same counts. Phases are told apart by parity: a
//   thread waits for "the phase of parity 0" to end, then for that of parity 1, and so on. A
//   barrier as initialised counts as if a phase of parity 1 had just ended.
//
// Tiles lie in shared memory "128-byte swizzled": a row of 64 bfloat16 is 128 bytes, rows follow
// one another, and of the eight 16-byte pieces of row r piece k lies in the place of k ^ (r % 8).
// So a column of pieces is spread over all banks. The copy engine writes, and the tensor cores
// read, in that order; both take the row from bits 7 to 9 of the address, so tiles begin at
// multiples of 1024 bytes.
//
// As host C++ <cuda.h> is the emulation's, which has the functions of this file after the PTX
// manual and reports misuse; tile_descriptor() and encode_tensor_map() are the same code on both.
#pragma once

#include <c10/util/BFloat16.h>
#include <cuda.h>

#include <cstdint>

#include "shared.cuh"

namespace lsoftmax {
namespace hopper {

constexpr int kWarpgroup = 128;  // threads
constexpr int kTileDepth = 64;   // columns of a tile: 128 bytes
constexpr int kTileAlignment = 1024;
constexpr int kProductRows = 64, kProductColumns = 256, kProductDepth = 16;  // of one multiply()
// Each thread has this many of the products. Of thread t number i is row
// t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column i / 4 * 8 + t % 4 * 2 + i % 2.
constexpr int kAccumulators = kProductRows * kProductColumns / kWarpgroup;

// How wgmma is told where a tile is: the address (of 18 bits, in units of 16 bytes), the distance
// from 8 rows to the next 8 (also in units of 16 bytes, from bit 32), and the kind of swizzle (bits
// 62 and 63; 1: of 128 bytes). Columns 16 k to 16 k + 15 of the tile begin 32 k bytes further on:
// the swizzle applies to addresses, so it needs no other word.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kEightRows = 8 * kTileDepth * sizeof(c10::BFloat16);
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | kEightRows >> 4 << 32 | kSwizzle128 << 62;
}

// For tiles of `tile_rows` rows by kTileDepth columns out of a (rows, columns) matrix.
inline cudaError_t encode_tensor_map(CUtensorMap* map, const c10::BFloat16* matrix, int64_t rows,
                                     int64_t columns, int tile_rows) {
  // By way of the runtime, so that nothing need be linked with the driver's library.
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr char kName[] = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {size[0] * sizeof(c10::BFloat16)};
  const cuuint32_t box[] = {kTileDepth, static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<c10::BFloat16*>(matrix), size,
             row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#ifdef __CUDACC__

struct Barrier {
  uint64_t word;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The launch's dynamic shared memory, as T; and its address, which is a multiple of 16.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}
__device__ __forceinline__ uint32_t dynamic_address() {
  return shared_address(dynamic_shared<uint4>());
}

// ---- barriers -----------------------------------------------------------------------------------

// By one thread, then publish_barriers(), then __syncthreads().
__device__ __forceinline__ void initialise(Barrier& barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// Lets the copy engine see barriers that this thread has initialised.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives, and makes the phase last until the copy engine has brought that many bytes.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of that parity has ended. try_wait itself sleeps a while before it says no.
__device__ __forceinline__ void wait(Barrier& barrier, unsigned parity) {
  unsigned ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// ---- the copy engine ----------------------------------------------------------------------------

// By one thread: the tile that begins at (row, column) of the matrix, to shared memory at `address`
// (a multiple of kTileAlignment). The bytes of a whole tile are reported to `barrier`.
__device__ __forceinline__ void load_tile(uint32_t address, const CUtensorMap& map, int row,
                                          int column, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(address),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// ---- the tensor cores ---------------------------------------------------------------------------
// Each of these is called by all threads of a warpgroup together.

#define LSOFTMAX_4(m, i) m(i), m(i + 1), m(i + 2), m(i + 3)
#define LSOFTMAX_16(m, i) \
  LSOFTMAX_4(m, i), LSOFTMAX_4(m, i + 4), LSOFTMAX_4(m, i + 8), LSOFTMAX_4(m, i + 12)
#define LSOFTMAX_64(m, i) \
  LSOFTMAX_16(m, i), LSOFTMAX_16(m, i + 16), LSOFTMAX_16(m, i + 32), LSOFTMAX_16(m, i + 48)
#define LSOFTMAX_SUM(i) "+f"(sums[i])
#define LSOFTMAX_SUMS LSOFTMAX_64(LSOFTMAX_SUM, 0), LSOFTMAX_64(LSOFTMAX_SUM, 64)

// Before the first multiply() after anything else has touched the sums.
__device__ __forceinline__ void multiply_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// sums += A B': 64 rows of a tile by 256 rows of another, 16 columns deep. Behind the descriptors:
// add to the sums (p), take A and B as they are (1, 1), and the columns of both are next to each
// other in memory (0, 0).
__device__ __forceinline__ void multiply(float (&sums)[kAccumulators], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "%128, %129, p, 1, 1, 0, 0;\n"
      "}\n"
      : LSOFTMAX_SUMS
      : "l"(a), "l"(b));
}

// Closes a group of the multiply() since the last one.
__device__ __forceinline__ void multiply_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all is done, with shared memory too. The sums are operands, so that the compiler reads none
// of them before.
__device__ __forceinline__ void multiply_finish(float (&sums)[kAccumulators]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : LSOFTMAX_SUMS : : "memory");
}

#undef LSOFTMAX_4
#undef LSOFTMAX_16
#undef LSOFTMAX_64
#undef LSOFTMAX_SUM
#undef LSOFTMAX_SUMS

// ---- registers, exponentials --------------------------------------------------------------------

// A block's registers are dealt out evenly at launch; a warpgroup may hand some back, and another
// may take them.
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 2^v to 2 units in the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// Two bfloat16, rounded to nearest even, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float first, float second) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

#endif

}  // namespace hopper
}  // namespace lsoftmax
