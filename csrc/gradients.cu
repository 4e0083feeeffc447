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

// load_pack without its count, which is of the passes over N x C.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> peek(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

// Whether all rows of d elements of these matrices are whole packs.
template <int V, typename... Ts>
__device__ __forceinline__ bool in_packs(int64_t d, const Ts*... matrices) {
  return d % V == 0 && ((reinterpret_cast<uintptr_t>(matrices) % (V * sizeof(Ts)) == 0) && ...);
}

template <typename T>
__device__ typename Storage<T>::Acc scalar_gradient_of(const BackwardRows<T>& p, int64_t i) {
  using A = typename Storage<T>::Acc;
  return (p.grad == nullptr ? A(1) : p.grad[i]) / *p.divisor;
}

// The upstream gradient of all rows that are kept, where it is one number; else 0, of no use.
template <typename T>
__device__ typename Storage<T>::Acc gradient_of_all(const BackwardRows<T>& p) {
  using A = typename Storage<T>::Acc;
  return p.shares == nullptr || p.grad_per_row ? A(0) : scalar_gradient_of(p, 0);
}

// That of a row's loss; 1 where it is in the rows already. `alike`: gradient_of_all.
template <typename T>
__device__ typename Storage<T>::Acc gradient_of(const BackwardRows<T>& p, int64_t i,
                                                typename Storage<T>::Acc alike) {
  using A = typename Storage<T>::Acc;
  if (p.shares == nullptr) return A(1);
  if (p.target[i] == p.ignore_index) return A(0);  // the mean of no kept rows has an infinite one
  return p.grad_per_row ? scalar_gradient_of(p, i) : alike;
}

template <typename T>
__device__ typename Storage<T>::Acc constant_of(const BackwardRows<T>& p, int64_t i,
                                                typename Storage<T>::Acc alike) {
  using A = typename Storage<T>::Acc;
  if (p.shares == nullptr) return p.rows[4 * p.n + i];
  return gradient_of(p, i, alike) * static_cast<A>(p.constant);
}

// constant_x of 32 columns of X, one a lane; each warp takes some of the rows.
template <typename T>
__device__ void sum_constant_x(const BackwardRows<T>& p, int64_t columns) {
  using A = typename Storage<T>::Acc;
  constexpr int kInFlight = 8;
  __shared__ SharedArray<A, kMaxThreads> partial;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t j = columns * kWarp + lane;
  const A alike = gradient_of_all(p);
  A sum = 0;
  for (int64_t first = warp; j < p.d && first < p.n; first += int64_t{kInFlight} * warps) {
    A shares[kInFlight];
    T xs[kInFlight];  // all under way before the first is waited for
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) {
      const int64_t i = first + int64_t{m} * warps, row = i < p.n ? i : first;
      xs[m] = p.x[row * p.d + j];
      shares[m] = i < p.n ? constant_of(p, row, alike) : A(0);
    }
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) {  // an ignored x may be NaN
      if (shares[m] != 0) sum += shares[m] * static_cast<A>(xs[m]);
    }
  }
  partial[static_cast<int>(threadIdx.x)] = sum;
  __syncthreads();
  if (warp != 0 || j >= p.d) return;
  for (int k = 1; k < warps; ++k) sum += partial[k * kWarp + lane];
  p.constant_x[j] = as_exponential<T>(sum);
}

// x may be NaN where the row is ignored.
template <int V, typename T>
__device__ void scale_row(const BackwardRows<T>& p, int64_t i, typename Storage<T>::Acc scale,
                          bool ignored) {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  for (int64_t j = int64_t{threadIdx.x} * V; j < p.d; j += int64_t{blockDim.x} * V) {
    const auto xs = peek<T, V>(p.x + i * p.d + j);
    Pack<E, V> scaled;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      scaled.values[v] = as_exponential<T>(ignored ? A(0) : scale * static_cast<A>(xs.values[v]));
    }
    *reinterpret_cast<Pack<E, V>*>(p.scaled_x + i * p.d + j) = scaled;
  }
}

// A block a row; then, with label smoothing, one for each 32 columns.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) backward_rows_kernel(BackwardRows<T> p) {
  using A = typename Storage<T>::Acc;
  const int64_t i = blockIdx.x;
  if (i >= p.n) return sum_constant_x(p, i - p.n);
  const bool ignored = p.target[i] == p.ignore_index;
  const A alike = gradient_of_all(p);
  const A g = gradient_of(p, i, alike), scale = g * p.rows[i];
  if (threadIdx.x == 0 && p.shares != nullptr) {
    for (int64_t k = 0; k < 4; ++k) p.shares[k * p.n + i] = g * p.rows[k * p.n + i];
    p.shares[4 * p.n + i] = constant_of(p, i, alike);
  }
  if (p.order != nullptr) write_order(p.order, p.target, p.n, i);
  if (p.scaled_x == nullptr) return;
  constexpr int kVector = 4;
  in_packs<kVector>(p.d, p.x) ? scale_row<kVector>(p, i, scale, ignored)
                              : scale_row<1>(p, i, scale, ignored);
}

// Row i of dX.
template <int V, typename T, bool kWide>
__device__ void finish_input(const FinishGradients<T, kWide>& p, int64_t i) {
  using A = typename Storage<T>::Acc;
  using DX = typename FinishGradients<T, kWide>::DX;
  const bool has_rest = p.rest != nullptr && p.rest[i] != 0;  // a NaN even where y is elsewhere, -1
  const T* w_y = has_rest && p.target[i] >= 0 ? p.w + p.target[i] * p.d : nullptr;
  const A scale = p.scale == nullptr ? A(1) : p.scale[i], share = p.input[i];
  const A rest = w_y == nullptr ? A(0) : p.rest[i];
  const A constant = p.constant == nullptr ? A(0) : p.constant[i];
  for (int64_t j = int64_t{threadIdx.x} * V; j < p.d; j += int64_t{blockDim.x} * V) {
    const auto products = peek<A, V>(p.product + i * p.d + j);
    Pack<T, V> xs{}, ws{};
    Pack<A, V> constants{};
    if (share != 0) xs = peek<T, V>(p.x + i * p.d + j);
    if (w_y != nullptr) ws = peek<T, V>(w_y + j);
    if (constant != 0) constants = peek<A, V>(p.product + p.n * p.d + j);
    Pack<DX, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A value = scale * products.values[v];
      if (share != 0) value += share * static_cast<A>(xs.values[v]);
      if (w_y != nullptr) value += rest * static_cast<A>(ws.values[v]);
      if (constant != 0) value += constant * constants.values[v];
      out.values[v] = static_cast<DX>(value);
    }
    *reinterpret_cast<Pack<DX, V>*>(p.dx + i * p.d + j) = out;
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
template <int V, typename T, bool kWide>
__device__ Pack<typename Storage<T>::Acc, V> sum_rest(const FinishGradients<T, kWide>& p,
                                                      const int64_t* order, int rows, int64_t j) {
  using A = typename Storage<T>::Acc;
  constexpr int kFetched = 64, kInFlight = 8;
  __shared__ SharedArray<int64_t, kFetched> row;
  __shared__ SharedArray<A, kFetched> rest;
  Pack<A, V> sum{};
  for (int first = 0; first < rows; first += kFetched) {
    const int count = rows - first < kFetched ? rows - first : kFetched;
    __syncthreads();  // those before have been read
    for (int k = threadIdx.x; k < kFetched; k += blockDim.x) {
      const int64_t i = order[k < count ? first + k : first];
      row[k] = i;
      rest[k] = k < count ? p.rest[i] : A(0);  // beyond the last: nothing of the first
    }
    __syncthreads();
    if (j >= p.d) continue;
    for (int k = 0; k < count; k += kInFlight) {
      Pack<T, V> xs[kInFlight];  // all under way before the first is waited for
#pragma unroll
      for (int m = 0; m < kInFlight; ++m) xs[m] = peek<T, V>(p.x + row[k + m] * p.d + j);
#pragma unroll
      for (int m = 0; m < kInFlight; ++m) {
        const A share = rest[k + m];
#pragma unroll
        for (int v = 0; v < V; ++v) {  // an ignored x may be NaN
          if (share != 0) sum.values[v] += share * static_cast<A>(xs[m].values[v]);
        }
      }
    }
  }
  return sum;
}

// The class's row of dW, of which `h` is the share of its own vector.
template <int V, typename T, bool kWide>
__device__ void add_to_class(const FinishGradients<T, kWide>& p, const int64_t* order, int rows,
                             int64_t y, int64_t line, typename Storage<T>::Acc h) {
  using A = typename Storage<T>::Acc;
  using DW = typename FinishGradients<T, kWide>::DW;
  for (int64_t columns = 0; columns < p.d; columns += int64_t{blockDim.x} * V) {
    const int64_t j = columns + int64_t{threadIdx.x} * V;
    const auto sum = sum_rest<V>(p, order, rows, j);
    if (j >= p.d) continue;
    auto* const at = reinterpret_cast<Pack<DW, V>*>(p.dw + line * p.d + j);
    Pack<DW, V> out = *at;
    const auto ws = peek<T, V>(p.w + y * p.d + j);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.values[v] = static_cast<DW>(static_cast<A>(out.values[v]) +
                                      (sum.values[v] + h * static_cast<A>(ws.values[v])));
    }
    *at = out;
  }
}

// The row of dW of one class: the block at the first of its places in the order does it.
template <typename T, bool kWide>
__device__ void finish_class(const FinishGradients<T, kWide>& p, int64_t place) {
  using A = typename Storage<T>::Acc;
  const int64_t* order = p.order + place;
  // Both places are looked up together, so that one does not wait for the other.
  const int64_t i = order[0], before = place > 0 ? order[-1] : i;
  const int64_t y = p.target[i], y_before = p.target[before], line = y - p.first_class;
  if (y < p.first_class || line >= p.width) return;  // ignored, or of another chunk
  if (place > 0 && y_before == y) return;
  ClassShare share{0, 0, 0};
  for (int64_t k = threadIdx.x; place + k < p.n && p.target[order[k]] == y; k += blockDim.x) {
    share.weight += static_cast<double>(p.weight[order[k]]);
    ++share.rows;
  }
  share = block_reduce(share, AddShares{});
  const A h = static_cast<A>(share.weight);
  const int rows = p.rest == nullptr ? 0 : share.rows;
  constexpr int kVector = 16 / sizeof(A);
  in_packs<kVector>(p.d, p.x, p.w, p.dw) ? add_to_class<kVector>(p, order, rows, y, line, h)
                                         : add_to_class<1>(p, order, rows, y, line, h);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kMaxThreads, 2)
    finish_gradients_kernel(FinishGradients<T, kWide> p) {
  // Side by side: each is a chain of loads that wait for each other.
  const int64_t block = blockIdx.x, inputs = p.dx == nullptr ? 0 : p.n;
  if (block >= inputs) return finish_class(p, block - inputs);
  constexpr int kVector = 16 / sizeof(typename Storage<T>::Acc);
  in_packs<kVector>(p.d, p.x, p.w, p.product, p.dx) ? finish_input<kVector>(p, block)
                                                    : finish_input<1>(p, block);
}

}  // namespace

template <typename T>
cudaError_t launch_backward_rows(const BackwardRows<T>& params, cudaStream_t stream) {
  const int64_t columns = params.scaled_x == nullptr ? 1 : params.d;
  const int64_t compared = params.order == nullptr ? 1 : params.n;
  int threads = threads_for(columns > compared ? columns : compared);
  const int64_t sums = params.constant_x == nullptr ? 0 : (params.d + kWarp - 1) / kWarp;
  if (sums > 0 && threads < 256) threads = 256;  // a warp's rows are in turn
  return launch(backward_rows_kernel<T>, params.n + sums, threads, stream, params);
}

template <typename T, bool kWide>
cudaError_t launch_finish_gradients(const FinishGradients<T, kWide>& params, cudaStream_t stream) {
  const int64_t blocks = params.n * ((params.dx != nullptr) + (params.dw != nullptr));
  return launch(finish_gradients_kernel<T, kWide>, blocks, threads_for(2 * params.d), stream,
                params);
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
