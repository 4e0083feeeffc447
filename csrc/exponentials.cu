// Backward of a loss whose exponentials were not kept: E of a chunk of classes once more, from its
// logits and the reference that forward chose for each row. One read and one write of the chunk.

#include "block.cuh"
#include "hopper.h"
#include "lsoftmax.h"
#include "row_terms.cuh"

namespace lsoftmax {
namespace {

constexpr int kInFlight = 4;  // packs a thread loads before it works on the first

// As far as either forward pass lets a logit lie above its reference.
constexpr int kFarthest = 56;
static_assert(kFarthest >= kSlack && kFarthest * kLog2E >= kSafe);

// What the exponentials of row i need of it.
template <typename T>
struct RowOfChunk {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  static constexpr int kVector = 16 / sizeof(A);

  const A* z;
  E* e;
  int64_t target;  // counted from the chunk's first class
  A reference, e_y;

  __device__ RowOfChunk(const Exponentials<T>& p, int64_t i)
      : z(p.z + i * p.stride),
        e(p.e + i * p.stride),
        target(p.target[i] - p.first_class),
        reference(p.reference[i]),
        e_y(0) {
    if (p.rows != nullptr && p.rows[i] != 0) e_y = p.rows[3 * p.n + i] / p.rows[i];
  }

  template <int V>
  __device__ void store(const Pack<A, V>& logits, int64_t j) const {
    Pack<E, V> exps;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // Huge logits may round otherwise than when the reference was chosen: stay in range. NaN
      // stays.
      A above = logits.values[v] - reference;
      if (above > kFarthest) above = kFarthest;
      const A value = j + v == target ? e_y : exponential(above);
      exps.values[v] = as_exponential<T>(value);
    }
    store_pack<V>(e + j, exps);
  }
};

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) exponentials_kernel(Exponentials<T> p) {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  constexpr int kVector = RowOfChunk<T>::kVector;
  const int64_t i = blockIdx.x, packs = p.width / kVector;
  if (i == p.n) {
    const A* weights = p.class_weight == nullptr ? nullptr : p.class_weight + p.first_class;
    return write_class_weights<T>(p.e + i * p.stride, weights, p.width, p.width);
  }
  if (p.target[i] == p.ignore_index) {  // its logits may be NaN, and 0 * NaN is not 0
    for (int64_t j = threadIdx.x; j < p.width; j += blockDim.x) {
      p.e[i * p.stride + j] = static_cast<E>(0.0f);
    }
    return;
  }
  const RowOfChunk<T> row(p, i);
  for (int64_t first = threadIdx.x; first < packs; first += int64_t{kInFlight} * blockDim.x) {
    Pack<A, kVector> logits[kInFlight];
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const int64_t k = first + int64_t{n} * blockDim.x;
      if (k < packs) logits[n] = load_pack<kVector>(row.z + k * kVector);
    }
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const int64_t k = first + int64_t{n} * blockDim.x;
      if (k < packs) row.template store<kVector>(logits[n], k * kVector);
    }
  }
  for (int64_t j = packs * kVector + threadIdx.x; j < p.width; j += blockDim.x) {
    row.template store<1>(load_pack<1>(row.z + j), j);
  }
}

}  // namespace

template <typename T>
cudaError_t launch_exponentials(const Exponentials<T>& params, cudaStream_t stream) {
  const int64_t blocks = params.n + (params.class_weights ? 1 : 0);
  return launch(exponentials_kernel<T>, blocks, threads_for(params.width), stream, params);
}

template cudaError_t launch_exponentials(const Exponentials<float>&, cudaStream_t);
template cudaError_t launch_exponentials(const Exponentials<double>&, cudaStream_t);
template cudaError_t launch_exponentials(const Exponentials<c10::Half>&, cudaStream_t);
template cudaError_t launch_exponentials(const Exponentials<c10::BFloat16>&, cudaStream_t);

}  // namespace lsoftmax
