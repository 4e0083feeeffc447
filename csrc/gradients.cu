// Backward of both ops, around the two matrix products that do the work.
//
// Before them, the upstream gradient goes into the row statistics and into X; after them, the
// norms' share of the margin is added: a multiple of x_i to row i of dX, a multiple of w_c to row c
// of dW. The rows are sorted by target, and a class's shares are summed by the block of its first
// row: no atomics, so every run gives the same bits, and rows of dW without a target are not
// touched.

#include "block.cuh"
#include "lsoftmax.h"
#include "order.cuh"

namespace lsoftmax {
namespace {

// The upstream gradient of a row's loss; 1 where it is in the rows already.
template <typename T>
__device__ typename Storage<T>::Acc gradient_of(const BackwardRows<T>& p, int64_t i) {
  using A = typename Storage<T>::Acc;
  if (p.shares == nullptr) return A(1);
  if (p.target[i] == p.ignore_index) return A(0);  // the mean of no kept rows has an infinite one
  const A grad = p.grad == nullptr ? A(1) : p.grad[p.grad_per_row ? i : 0];
  return grad / *p.divisor;
}

template <typename T>
__device__ typename Storage<T>::Acc constant_of(const BackwardRows<T>& p, int64_t i) {
  using A = typename Storage<T>::Acc;
  if (p.shares == nullptr) return p.rows[4 * p.n + i];
  return gradient_of(p, i) * static_cast<A>(p.constant);
}

// constant_x of 32 columns of X, one a lane; each warp takes some of the rows.
template <typename T>
__device__ void sum_constant_x(const BackwardRows<T>& p, int64_t columns) {
  using A = typename Storage<T>::Acc;
  __shared__ SharedArray<A, kMaxThreads> partial;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t j = columns * kWarp + lane;
  A sum = 0;
  for (int64_t i = warp; j < p.d && i < p.n; i += warps) {
    const A share = constant_of(p, i);
    if (share != 0) sum += share * static_cast<A>(p.x[i * p.d + j]);  // an ignored x may be NaN
  }
  partial[static_cast<int>(threadIdx.x)] = sum;
  __syncthreads();
  if (warp != 0 || j >= p.d) return;
  for (int k = 1; k < warps; ++k) sum += partial[k * kWarp + lane];
  p.constant_x[j] = as_exponential<T>(sum);
}

// A block a row; then, with label smoothing, one for each 32 columns.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) backward_rows_kernel(BackwardRows<T> p) {
  using A = typename Storage<T>::Acc;
  const int64_t i = blockIdx.x;
  if (i >= p.n) return sum_constant_x(p, i - p.n);
  const bool ignored = p.target[i] == p.ignore_index;
  const A g = gradient_of(p, i), scale = g * p.rows[i];
  if (threadIdx.x == 0 && p.shares != nullptr) {
    for (int64_t k = 0; k < 4; ++k) p.shares[k * p.n + i] = g * p.rows[k * p.n + i];
    p.shares[4 * p.n + i] = constant_of(p, i);
  }
  if (p.order != nullptr) write_order(p.order, p.target, p.n, i);
  if (p.scaled_x == nullptr) return;
  for (int64_t j = threadIdx.x; j < p.d; j += blockDim.x) {
    const A value =
        ignored ? A(0) : scale * static_cast<A>(p.x[i * p.d + j]);  // x may be NaN there
    p.scaled_x[i * p.d + j] = as_exponential<T>(value);
  }
}

// Row i of dX.
template <typename T, bool kWide>
__device__ void finish_input(const FinishGradients<T, kWide>& p, int64_t i) {
  using A = typename Storage<T>::Acc;
  using DX = typename FinishGradients<T, kWide>::DX;
  const bool has_rest = p.rest != nullptr && p.rest[i] != 0;  // a NaN even where y is elsewhere, -1
  const T* w_y = has_rest && p.target[i] >= 0 ? p.w + p.target[i] * p.d : nullptr;
  const A scale = p.scale == nullptr ? A(1) : p.scale[i], share = p.input[i];
  const A rest = w_y == nullptr ? A(0) : p.rest[i];
  const A constant = p.constant == nullptr ? A(0) : p.constant[i];
  for (int64_t j = threadIdx.x; j < p.d; j += blockDim.x) {
    A value = scale * p.product[i * p.d + j];
    if (share != 0) value += share * static_cast<A>(p.x[i * p.d + j]);
    if (w_y != nullptr) value += rest * static_cast<A>(w_y[j]);
    if (constant != 0) value += constant * p.product[p.n * p.d + j];
    p.dx[i * p.d + j] = static_cast<DX>(value);
  }
}

struct ClassShare {
  double weight;
  int rows, unused;  // whole words for the shuffles
};

struct AddShares {
  __device__ ClassShare operator()(const ClassShare& p, const ClassShare& q) const {
    return {p.weight + q.weight, p.rows + q.rows, 0};
  }
};

// The rest's share of column j of a class's row of dW. Called by the whole block: it fetches the
// rows together, so that reading x waits for nothing else.
template <typename T, bool kWide>
__device__ typename Storage<T>::Acc sum_rest(const FinishGradients<T, kWide>& p,
                                             const int64_t* order, int rows, int64_t j) {
  using A = typename Storage<T>::Acc;
  constexpr int kFetched = 64;
  __shared__ SharedArray<int64_t, kFetched> row;
  __shared__ SharedArray<A, kFetched> rest;
  A sum = 0;
  for (int first = 0; first < rows; first += kFetched) {
    const int count = rows - first < kFetched ? rows - first : kFetched;
    __syncthreads();  // those before have been read
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
      row[k] = order[first + k];
      rest[k] = p.rest[order[first + k]];
    }
    __syncthreads();
    if (j >= p.d) continue;
#pragma unroll 8
    for (int k = 0; k < count; ++k) {
      const A share = rest[k];
      if (share != 0) sum += share * static_cast<A>(p.x[row[k] * p.d + j]);  // ignored: maybe NaN
    }
  }
  return sum;
}

// The row of dW of one class: the block at the first of its places in the order does it.
template <typename T, bool kWide>
__device__ void finish_class(const FinishGradients<T, kWide>& p, int64_t place) {
  using A = typename Storage<T>::Acc;
  using DW = typename FinishGradients<T, kWide>::DW;
  const int64_t* order = p.order + place;
  const int64_t y = p.target[order[0]], line = y - p.first_class;
  if (y < p.first_class || line >= p.width) return;  // ignored, or of another chunk
  if (place > 0 && p.target[order[-1]] == y) return;
  ClassShare share{0, 0, 0};
  for (int64_t k = threadIdx.x; place + k < p.n && p.target[order[k]] == y; k += blockDim.x) {
    share.weight += static_cast<double>(p.weight[order[k]]);
    ++share.rows;
  }
  share = block_reduce(share, AddShares{});
  const A h = static_cast<A>(share.weight);
  const int rows = p.rest == nullptr ? 0 : share.rows;
  for (int64_t columns = 0; columns < p.d; columns += blockDim.x) {
    const int64_t j = columns + threadIdx.x;
    const A sum = sum_rest(p, order, rows, j);
    if (j >= p.d) continue;
    DW& out = p.dw[line * p.d + j];
    out = static_cast<DW>(static_cast<A>(out) + (sum + h * static_cast<A>(p.w[y * p.d + j])));
  }
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kMaxThreads)
    finish_gradients_kernel(FinishGradients<T, kWide> p) {
  if (p.dx != nullptr) finish_input(p, blockIdx.x);
  if (p.dw != nullptr) finish_class(p, blockIdx.x);
}

}  // namespace

template <typename T>
cudaError_t launch_backward_rows(const BackwardRows<T>& params, cudaStream_t stream) {
  const int64_t columns = params.scaled_x == nullptr ? 1 : params.d;
  const int64_t compared = params.order == nullptr ? 1 : params.n;
  const int threads = threads_for(columns > compared ? columns : compared);
  const int64_t sums = params.constant_x == nullptr ? 0 : (params.d + kWarp - 1) / kWarp;
  return launch(backward_rows_kernel<T>, params.n + sums, threads, stream, params);
}

template <typename T, bool kWide>
cudaError_t launch_finish_gradients(const FinishGradients<T, kWide>& params, cudaStream_t stream) {
  // A block is a row of dX first. Where classes have many rows, one for each column that it adds up
  // matters more.
  const bool long_sums = params.dw != nullptr && params.n >= 4 * params.width;
  return launch(finish_gradients_kernel<T, kWide>, params.n,
                threads_for((long_sums ? 8 : 2) * params.d), stream, params);
}

#define LSOFTMAX_INSTANTIATE(T)                                                                 \
  template cudaError_t launch_backward_rows(const BackwardRows<T>&, cudaStream_t);              \
  template cudaError_t launch_finish_gradients(const FinishGradients<T, false>&, cudaStream_t); \
  template cudaError_t launch_finish_gradients(const FinishGradients<T, true>&, cudaStream_t);
LSOFTMAX_INSTANTIATE(float)
LSOFTMAX_INSTANTIATE(double)
LSOFTMAX_INSTANTIATE(c10::Half)
LSOFTMAX_INSTANTIATE(c10::BFloat16)
#undef LSOFTMAX_INSTANTIATE

}  // namespace lsoftmax
