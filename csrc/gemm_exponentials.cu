// E and its row sums in one kernel: a matrix product whose logits never leave the registers.
//
// At D = 512 a pass over bfloat16 logits costs 0.7 of the product that made them, and this kernel
// has none: 2 N C D flops, and 2 (N D + C D + N C) bytes if x and w come from memory once. At
// (4096, 512, 1M) on an H200 that is 5.3 ms at 790 TFLOP/s and 2.1 ms at 4.3 TB/s; below D = 200
// or so the writing of E is the floor. Between the L2 and the multiprocessors go 2 N C D (1/128 +
// 1/256) bytes, 49 GB there: at some 7 TB/s it is 7 ms, and so the first limit to expect. (Blocks
// in pairs that share what they load of w would bring it to 33 GB.)
//
// A block computes tiles of 128 rows by 256 classes, 64 columns of x and w ("a stage") at a time.
// A producer thread keeps a ring of kStages stages filled; two warpgroups multiply, each its 64
// rows of the tile, and then take exponentials, 16 a clock: 1024 clocks or more for half a tile, of
// which a stage takes 512 (1024 when both multiply). The exponentials of one should run under the
// products of the other, so the two are kept apart: the follower begins a stage when the leader has
// done it, and still has products to do when the leader has come to its exponentials; while the
// follower is at its own, the leader is in the next tile. A larger kLead hides more of them, and
// leaves less of the ring for copies under way. Each warpgroup with a tile of its own would hide
// all, but ask 80 bytes a clock of the L2 instead of 48.
//
//   full[slot]    the copy engine has filled it            producer -> leader and follower
//   passed[slot]  the leader has read it                   leader -> follower
//   empty[slot]   both have read it                        leader and follower -> producer

#include "block.cuh"
#include "epilogue.cuh"
#include "hopper.cuh"
#include "hopper.h"

namespace lsoftmax {
namespace {

using namespace hopper;

constexpr int kStages = 4, kLead = 1;
constexpr int kThreads = 3 * kWarpgroup;  // producer, leader, follower
constexpr int kRowBytes = kTileDepth * sizeof(c10::BFloat16);
constexpr int kStageBytes = (kTileRows + kTileClasses) * kRowBytes;
constexpr int kDynamicBytes = kStagingBytes + kTileAlignment + kStages * kStageBytes;
static_assert(kTileRows == 2 * kProductRows && kTileClasses == kProductColumns);
static_assert(kLead >= 1 && kLead < kStages, "the leader must not wait for what it holds up");

struct Params {
  CUtensorMap x_map, w_map;
  GemmExponentials p;
};

// Device code for 9.0a only; the host's pass of nvcc and the emulation take it too.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kWarpsPerGroup = kWarpgroup / kWarp;

// Registers a thread: 168 at launch, which is 65536 / 384 in whole eights; the producer needs next
// to none, and what it gives up is all that the others can get.
constexpr int kProducerRegisters = 40, kMultiplierRegisters = 232;
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
static_assert(kWarpgroup * (kProducerRegisters + 2 * kMultiplierRegisters) <=
                  kThreads * kLaunchRegisters,
              "a warpgroup would wait for registers for ever");

// Tiles go down groups of so many rows of tiles, then on to the next classes: the tiles under way
// at a time share few rows of x and few of w, and stay in the L2.
constexpr int64_t kGroupTiles = 8;

struct Tiles {
  int64_t rows, classes;

  __device__ explicit Tiles(const GemmExponentials& p)
      : rows((p.n + kTileRows - 1) / kTileRows), classes(class_tiles(p.c)) {}
  __device__ int64_t count() const { return rows * classes; }
  __device__ Tile operator[](int64_t i) const {
    const int64_t above = i / (kGroupTiles * classes) * kGroupTiles;
    const int64_t group = rows - above < kGroupTiles ? rows - above : kGroupTiles;
    const int64_t within = i - above * classes, number = within / group;
    return {(above + within % group) * kTileRows, number * kTileClasses, number};
  }
};

// Where a warpgroup is in the ring. It goes round in the order of the stages, the parity of the
// barriers' phases changes with each round.
struct Position {
  int slot = 0;
  unsigned parity = 0;
  __device__ void advance() {
    if (++slot < kStages) return;
    slot = 0;
    parity ^= 1;
  }
};

struct Ring {
  Barrier *full, *passed, *empty;  // (kStages,)
  uint32_t memory;                 // (kStages, kTileRows + kTileClasses) rows of kRowBytes

  __device__ uint32_t x_tile(int slot) const { return memory + slot * kStageBytes; }
  __device__ uint32_t w_tile(int slot) const { return x_tile(slot) + kTileRows * kRowBytes; }
};

__device__ int stages_of(const GemmExponentials& p) {
  return static_cast<int>((p.d + kTileDepth - 1) / kTileDepth);
}

__device__ void produce(const Params& params, const Ring& ring) {
  const GemmExponentials& p = params.p;
  const Tiles tiles(p);
  const int stages = stages_of(p);
  Position at;
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const Tile tile = tiles[i];
    for (int k = 0; k < stages; ++k, at.advance()) {
      wait(ring.empty[at.slot], at.parity ^ 1);  // at once in the first round
      Barrier& full = ring.full[at.slot];
      arrive_expecting(full, kStageBytes);
      load_tile(ring.x_tile(at.slot), params.x_map, static_cast<int>(tile.row), k * kTileDepth,
                full);
      load_tile(ring.w_tile(at.slot), params.w_map, static_cast<int>(tile.first_class),
                k * kTileDepth, full);
    }
  }
}

// The leader's or the follower's part: products over a tile, then exponentials. One code for both,
// not a template: it is long, and the instruction cache holds it once.
__device__ void multiply_tiles(const GemmExponentials& p, const Ring& ring, bool follows) {
  const Tiles tiles(p);
  const int stages = stages_of(p);
  const int warp = threadIdx.x / kWarp % kWarpsPerGroup, lane = threadIdx.x % kWarp;
  const int first_row = follows ? kProductRows : 0;
  Position at, leader;
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    // First, so that what it loads is there when it is wanted.
    const Epilogue epilogue(p, tiles[i], (follows ? kWarpsPerGroup : 0) + warp);
    float sums[kAccumulators] = {};
    int passed = 0;  // stages of this tile the leader has done, as far as the follower knows
    for (int k = 0; k < stages; ++k, at.advance()) {
      if (follows) {
        const int wanted = k + kLead < stages ? k + kLead : stages;
        for (; passed < wanted; ++passed, leader.advance()) {
          wait(ring.passed[leader.slot], leader.parity);
        }
      }
      wait(ring.full[at.slot], at.parity);
      const uint32_t x = ring.x_tile(at.slot) + first_row * kRowBytes, w = ring.w_tile(at.slot);
      multiply_begin();
#pragma unroll
      for (int depth = 0; depth < kTileDepth; depth += kProductDepth) {
        const uint32_t bytes = depth * sizeof(c10::BFloat16);
        multiply(sums, tile_descriptor(x + bytes), tile_descriptor(w + bytes));
      }
      multiply_commit();
      multiply_finish(sums);  // the other warpgroup keeps the tensor cores busy meanwhile
      if (lane == 0) {
        if (!follows) arrive(ring.passed[at.slot]);
        arrive(ring.empty[at.slot]);
      }
    }
    epilogue.finish(sums);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    gemm_exponentials_kernel(const __grid_constant__ Params params) {
  __shared__ Barrier full[kStages], passed[kStages], empty[kStages];
  const uint32_t staged = dynamic_address() + kStagingBytes;
  const Ring ring{full, passed, empty,
                  (staged + kTileAlignment - 1) / kTileAlignment * kTileAlignment};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      initialise(full[slot], 1);                 // the producer
      initialise(passed[slot], kWarpsPerGroup);  // a lane of each warp that has read it
      initialise(empty[slot], 2 * kWarpsPerGroup);
    }
    publish_barriers();
  }
  __syncthreads();
  // From a lane of the warp, so that the compiler knows it to be the same in all of them.
  const int group = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  if (group == 0) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(params, ring);
  } else {
    raise_registers<kMultiplierRegisters>();
    multiply_tiles(params.p, ring, group == 2);
  }
}

#else

__global__ void __launch_bounds__(kThreads, 1)
    gemm_exponentials_kernel(const __grid_constant__ Params) {}

#endif

// Of a build without 9.0a a device gets the empty kernel, which has no registers to speak of.
bool built_for_hopper() {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, gemm_exponentials_kernel);
  if (error != cudaSuccess) cudaGetLastError();  // asked and answered
  return error == cudaSuccess && attributes.numRegs >= kAccumulators;
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool gemm_exponentials_supported(const GemmExponentials& p) {
  const bool shape = p.d > 0 && p.d % 8 == 0 && p.d <= INT32_MAX && p.c > 0 && p.c <= INT32_MAX &&
                     p.n <= INT32_MAX && (p.e == nullptr || p.e_stride % 8 == 0);
  return shape && aligned(p.x) && aligned(p.w) && aligned(p.e) &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0 && built_for_hopper();
}

cudaError_t launch_gemm_exponentials(const GemmExponentials& p, cudaStream_t stream) {
  if (!gemm_exponentials_supported(p)) return cudaErrorNotSupported;
  if (p.n == 0) return cudaSuccess;
  Params params{};
  params.p = p;
  cudaError_t error = encode_tensor_map(&params.x_map, p.x, p.n, p.d, kTileRows);
  if (error != cudaSuccess) return error;
  error = encode_tensor_map(&params.w_map, p.w, p.c, p.d, kTileClasses);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(gemm_exponentials_kernel,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamicBytes);
  if (error != cudaSuccess) return error;

  // One block a multiprocessor, which is all that fits; it works through every so-manieth tile.
  const int64_t count = tiles(p.n, p.c);
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(count < processors ? count : processors));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kDynamicBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, gemm_exponentials_kernel, params);
}

}  // namespace lsoftmax
