// What annealing that counts every class alike goes by: lsoftmax/portable_classes.py's formulas.

#include <c10/macros/Macros.h>

#include "block.cuh"
#include "lsoftmax.h"
#include "margin.cuh"

namespace lsoftmax {
namespace {

constexpr double kOne = 4294967296.0;  // 2^32, a cosine of 1 as an integer

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) own_cosines_kernel(OwnCosines<T> p) {
  const int64_t i = blockIdx.x, y = p.target[i];
  if (y == p.ignore_index) {
    if (threadIdx.x == 0) p.cosines[i] = INFINITY;
    return;
  }
  CUDA_KERNEL_ASSERT(y >= 0 && y < p.c);
  const Products sum = block_reduce(products(p.x + i * p.d, p.w + y * p.d, p.d), AddProducts{});
  if (threadIdx.x == 0) p.cosines[i] = static_cast<float>(cosine(sum));
}

// Integers, so that atomics in any order have one result. Two's complement adds as unsigned does.
__device__ __forceinline__ void add_exactly(int64_t* sum, int64_t number) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(number));
}

__device__ __forceinline__ int64_t as_integer(float moment) {
  return llrint(static_cast<double>(moment) * kOne);
}

__global__ void __launch_bounds__(kMaxThreads) sum_rows_kernel(ClassCosines p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  const float given = p.cosines[i];
  if (given == INFINITY) return;
  const float c = isnan(given) ? 0 : given;
  const int64_t y = p.target[i];
  CUDA_KERNEL_ASSERT(y >= 0 && y < p.c);
  int64_t* const sums = p.sums + y;
  add_exactly(sums, 1);
  add_exactly(sums + p.c, as_integer(c));
  add_exactly(sums + 2 * p.c, as_integer(c * c));
}

struct AddClasses {
  __device__ ClassSums operator()(const ClassSums& p, const ClassSums& q) const {
    return {p.mean + q.mean, p.square + q.square, p.known + q.known, p.came + q.came};
  }
};

// The running means, each block those of some classes; and of these classes what is left to add.
__global__ void __launch_bounds__(kMaxThreads) running_means_kernel(ClassCosines p) {
  const auto moved = [](float old, float rate, int64_t total, int64_t count) {
    const double mean = static_cast<double>(total) / (kOne * static_cast<double>(count));
    return old + rate * (static_cast<float>(mean) - old);
  };
  ClassSums sum{0, 0, 0, 0};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < p.c;
       k += stride) {
    float mean = p.classes[k], square = p.classes[p.c + k];
    const int64_t count = p.sums[k];
    if (count > 0) {
      const float rate = square < 0 ? 1 : static_cast<float>(1 - p.memory);
      mean = moved(mean, rate, p.sums[p.c + k], count);
      square = moved(square, rate, p.sums[2 * p.c + k], count);
      p.classes[k] = mean;
      p.classes[p.c + k] = square;
      sum.came += 1;
    }
    if (square < 0) continue;
    sum.mean += static_cast<double>(mean);
    sum.square += static_cast<double>(square);
    sum.known += 1;
  }
  sum = block_reduce(sum, AddClasses{});
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sum;
}

// One block, a fixed order: the same bits in every run.
__global__ void __launch_bounds__(kMaxThreads) low_class_cosine_kernel(ClassCosines p) {
  ClassSums sum{0, 0, 0, 0};
  for (int64_t k = threadIdx.x; k < p.partials; k += blockDim.x) {
    sum = AddClasses{}(sum, p.partial[k]);
  }
  sum = block_reduce(sum, AddClasses{});
  if (threadIdx.x != 0) return;
  const double mean = sum.mean / sum.known, variance = sum.square / sum.known - mean * mean;
  const double low = mean - sqrt(fabs(variance));  // rounding may be below 0
  *p.low = sum.came > 0 ? static_cast<float>(low) : INFINITY;
}

}  // namespace

template <typename T>
cudaError_t launch_own_cosines(const OwnCosines<T>& params, cudaStream_t stream) {
  return launch(own_cosines_kernel<T>, params.n, threads_for(params.d), stream, params);
}

cudaError_t launch_class_cosines(const ClassCosines& params, cudaStream_t stream) {
  if (params.n > 0) {
    const int64_t blocks = (params.n + kMaxThreads - 1) / kMaxThreads;
    const cudaError_t error = launch(sum_rows_kernel, blocks, kMaxThreads, stream, params);
    if (error != cudaSuccess) return error;
  }
  const int threads = threads_for_each(params.c);
  const cudaError_t error = launch(running_means_kernel, params.partials, threads, stream, params);
  if (error != cudaSuccess) return error;
  return launch(low_class_cosine_kernel, 1, threads_for_each(params.partials), stream, params);
}

#define LSOFTMAX_INSTANTIATE(T) \
  template cudaError_t launch_own_cosines(const OwnCosines<T>&, cudaStream_t);
LSOFTMAX_INSTANTIATE(float)
LSOFTMAX_INSTANTIATE(double)
LSOFTMAX_INSTANTIATE(c10::Half)
LSOFTMAX_INSTANTIATE(c10::BFloat16)
#undef LSOFTMAX_INSTANTIATE

}  // namespace lsoftmax
