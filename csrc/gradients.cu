// Backward of both ops, around the two matrix products that do the work.
//
// Before them, the upstream gradient goes into the row statistics and into X; after them, the
// norms' share of the margin is added: a multiple of x_i to row i of dX, a multiple of w_c to row c
// of dW. A class's shares are summed by the block of its first row in the batch: no atomics, so
// every run gives the same bits, and rows of dW without a target are not touched.

#include "block.cuh"
#include "lsoftmax.h"

namespace lsoftmax {
namespace {

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) backward_rows_kernel(BackwardRows<T> p) {
  using A = typename Storage<T>::Acc;
  const int64_t i = blockIdx.x;
  const bool ignored = p.target[i] == p.ignore_index;
  const A g = ignored ? A(0) : p.grad[p.grad_per_row ? i : 0] / *p.divisor;
  const A scale = g * p.rows[i];
  if (threadIdx.x == 0) {
    for (int64_t k = 0; k < 4; ++k) p.shares[k * p.n + i] = g * p.rows[k * p.n + i];
    p.shares[4 * p.n + i] = g * static_cast<A>(p.constant);
  }
  if (p.scaled_x == nullptr) return;
  for (int64_t j = threadIdx.x; j < p.d; j += blockDim.x) {
    const A value =
        ignored ? A(0) : scale * static_cast<A>(p.x[i * p.d + j]);  // x may be NaN there
    p.scaled_x[i * p.d + j] = static_cast<typename Storage<T>::E>(value);
  }
}

constexpr int kColumns = kWarp;  // of X a block sums, one a lane
constexpr int kRowLanes = 8;     // warps, each of which takes every eighth row

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) constant_row_kernel(ConstantRow<T> p) {
  using A = typename Storage<T>::Acc;
  __shared__ SharedArray<A, kRowLanes * kColumns> partial;
  const int lane = threadIdx.x % kColumns, warp = threadIdx.x / kColumns;
  const int64_t j = int64_t{blockIdx.x} * kColumns + lane;
  A sum = 0;
  for (int64_t i = warp; j < p.d && i < p.n; i += kRowLanes) {
    const A share = p.constant[i];
    if (share != 0) sum += share * static_cast<A>(p.x[i * p.d + j]);  // an ignored x may be NaN
  }
  partial[warp * kColumns + lane] = sum;
  __syncthreads();
  if (warp != 0 || j >= p.d) return;
  for (int k = 1; k < kRowLanes; ++k) sum += partial[k * kColumns + lane];
  p.sum[j] = static_cast<typename Storage<T>::E>(sum);
}

struct ClassShare {
  double sum;
  int earlier_row, unused;  // whole words for the shuffles
};

struct AddShares {
  __device__ ClassShare operator()(const ClassShare& p, const ClassShare& q) const {
    return {p.sum + q.sum, p.earlier_row | q.earlier_row, 0};
  }
};

// dw_y += h w_y + the sum of rest_k x_k over the rows k of class y, by the whole block.
template <typename T>
__device__ void add_class_shares(const FinishGradients<T>& p, int64_t y,
                                 typename Storage<T>::Acc h) {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  constexpr int kColumnsPerThread = 4;
  __shared__ SharedArray<unsigned, kMaxThreads / kWarp> matches;
  const int warps = blockDim.x / kWarp;
  const int64_t width = int64_t{kColumnsPerThread} * blockDim.x;
  for (int64_t left = 0; left < p.d; left += width) {
    A sums[kColumnsPerThread] = {};
    for (int64_t first = 0; p.rest != nullptr && first < p.n; first += blockDim.x) {
      const int64_t k = first + threadIdx.x;
      const unsigned votes = __ballot_sync(kFullMask, k < p.n && p.target[k] == y);
      __syncthreads();  // the votes before these have been read
      if (threadIdx.x % kWarp == 0) matches[threadIdx.x / kWarp] = votes;
      __syncthreads();
      for (int warp = 0; warp < warps; ++warp) {
        unsigned word = matches[warp];
        for (; word != 0; word &= word - 1) {
          const int64_t row = first + warp * kWarp + lowest_bit(word);
          const A share = p.rest[row];
          if (share == 0) continue;  // an ignored x may be NaN
#pragma unroll
          for (int v = 0; v < kColumnsPerThread; ++v) {
            const int64_t j = left + v * blockDim.x + threadIdx.x;
            if (j < p.d) sums[v] += share * static_cast<A>(p.x[row * p.d + j]);
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kColumnsPerThread; ++v) {
      const int64_t j = left + v * blockDim.x + threadIdx.x;
      if (j >= p.d) continue;
      E& out = p.dw[y * p.d + j];
      out = static_cast<E>(static_cast<A>(out) + (sums[v] + h * static_cast<A>(p.w[y * p.d + j])));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) finish_gradients_kernel(FinishGradients<T> p) {
  using A = typename Storage<T>::Acc;
  const int64_t i = blockIdx.x, y = p.target[i];
  const bool ignored = y < 0 || y >= p.c;
  if (p.dx != nullptr) {
    const A scale = p.scale == nullptr ? A(1) : p.scale[i], share = p.input[i];
    const A rest = p.rest == nullptr ? A(0) : p.rest[i];
    const A constant = p.constant == nullptr ? A(0) : p.constant[i];
    for (int64_t j = threadIdx.x; j < p.d; j += blockDim.x) {
      A value = scale * p.product[i * p.d + j];
      if (share != 0) value += share * static_cast<A>(p.x[i * p.d + j]);
      if (rest != 0) value += rest * static_cast<A>(p.w[y * p.d + j]);
      if (constant != 0) value += constant * p.product[p.n * p.d + j];
      p.dx[i * p.d + j] = static_cast<T>(value);
    }
  }
  if (p.dw == nullptr || ignored) return;
  ClassShare share{0, 0, 0};
  for (int64_t k = threadIdx.x; k < p.n; k += blockDim.x) {
    if (p.target[k] != y) continue;
    share.sum += static_cast<double>(p.weight[k]);
    if (k < i) share.earlier_row = 1;
  }
  share = block_reduce(share, AddShares{});
  if (share.earlier_row == 0) add_class_shares(p, y, static_cast<A>(share.sum));
}

}  // namespace

template <typename T>
cudaError_t launch_backward_rows(const BackwardRows<T>& params, cudaStream_t stream) {
  const int threads = threads_for(params.scaled_x == nullptr ? 1 : params.d);
  return launch(backward_rows_kernel<T>, params.n, threads, stream, params);
}

template <typename T>
cudaError_t launch_constant_row(const ConstantRow<T>& params, cudaStream_t stream) {
  if (params.d == 0) return cudaSuccess;
  const int64_t blocks = (params.d + kColumns - 1) / kColumns;
  return launch(constant_row_kernel<T>, blocks, kColumns * kRowLanes, stream, params);
}

template <typename T>
cudaError_t launch_finish_gradients(const FinishGradients<T>& params, cudaStream_t stream) {
  const int64_t longer = params.n > params.d ? params.n : params.d;
  return launch(finish_gradients_kernel<T>, params.n, threads_for(longer), stream, params);
}

#define LSOFTMAX_INSTANTIATE(T)                                                    \
  template cudaError_t launch_backward_rows(const BackwardRows<T>&, cudaStream_t); \
  template cudaError_t launch_constant_row(const ConstantRow<T>&, cudaStream_t);   \
  template cudaError_t launch_finish_gradients(const FinishGradients<T>&, cudaStream_t);
LSOFTMAX_INSTANTIATE(float)
LSOFTMAX_INSTANTIATE(double)
LSOFTMAX_INSTANTIATE(c10::Half)
LSOFTMAX_INSTANTIATE(c10::BFloat16)
#undef LSOFTMAX_INSTANTIATE

}  // namespace lsoftmax
