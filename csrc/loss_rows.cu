// Forward of the fused loss: one block turns one row of logits into E, the loss and five numbers.
//
// Fused, because a pass over N x C costs most of a matrix product at the sizes that matter: the
// norms, the cosine, the bucket, psi and the log-sum-exp of a row need its logits once. A logit is
// read once and its exponential written once, so the exponentials are taken against a reference
// chosen before the row's maximum is known: the larger of f and the maximum of the row's first
// packs. Range allows e^+-80 around it. A thread that meets a logit more than kSlack above its
// reference raises it, and rescales what it has written; at the end all threads agree on the
// largest reference, and those below it rescale. Both are rare, and the result is exact either way.
//
// Of a shard of the classes the same kernel leaves the sums of each row and its margin. There f is
// no part of the reference: it may be so far above the shard's logits that all their exponentials
// vanish, and the shards' sums are yet to be added up.

#include <c10/macros/Macros.h>

#include <limits>

#include "block.cuh"
#include "lsoftmax.h"
#include "row_terms.cuh"

namespace lsoftmax {
namespace {

constexpr int kInFlight = 4;  // packs a thread loads before it works on the first

template <typename A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

struct Max {
  // Of a NaN and a number the number.
  __device__ float operator()(float p, float q) const { return fmaxf(p, q); }
  __device__ double operator()(double p, double q) const { return fmax(p, q); }
};

template <typename T>
__device__ const typename Storage<T>::Acc* class_weights_at_hand(const LossRows<T>& p) {
  return p.class_weight == nullptr ? nullptr : p.class_weight + p.first_class;
}

// The packs of one row: a scalar head up to a 16-byte boundary of the logits, packs, a scalar tail.
// Thread t owns packs t, t + blockDim, ... and the head and tail elements of its number.
template <typename T>
struct Row {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  static constexpr int kVector = 16 / sizeof(A);

  const LossRows<T>& p;
  const A* z;
  const A* class_weight;  // of the classes at hand; or null
  E* e;
  int64_t target, head, packs;  // target: counted from the first class at hand
  bool smooth;
  RowSums<A> sums;

  __device__ Row(const LossRows<T>& params, int64_t i, E* e_row)
      : p(params),
        z(params.z + i * params.z_stride),
        class_weight(class_weights_at_hand(params)),
        e(e_row),
        target(params.target[i] - params.first_class),
        head(misaligned_head(z, params.width)),
        packs((params.width - head) / kVector),
        smooth(params.label_smoothing > 0),
        sums{0, 0, 0} {}

  __device__ int64_t tail() const { return head + packs * kVector; }

  template <int V>
  __device__ Pack<A, V> load(int64_t j) const {
    return load_pack<V>(z + j);
  }

  // -inf for the target's logit: its exponential is 0, and it is no maximum. To look for it once
  // a pack, not once a logit, saves a fifth of the instructions.
  template <int V>
  __device__ void leave_target_out(Pack<A, V>& logits, int64_t j) const {
    if (target < j || target >= j + V) return;
    const int place = static_cast<int>(target - j);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v == place) logits.values[v] = -INFINITY;
    }
  }

  template <int V>
  __device__ static A maximum(const Pack<A, V>& logits) {
    A m = -INFINITY;
    const Max larger;
#pragma unroll
    for (int v = 0; v < V; ++v) m = larger(logits.values[v], m);
    return m;
  }

  template <int V>
  __device__ A sample(int64_t j) const {
    Pack<A, V> logits = load<V>(j);
    leave_target_out(logits, j);
    return maximum(logits);
  }

  // The largest of this thread's first few logits, the target's not counted.
  __device__ A sample() const {
    A m = -INFINITY;
    const Max larger;
    for (int64_t j = threadIdx.x; j < head; j += blockDim.x) m = larger(m, sample<1>(j));
    for (int64_t k = threadIdx.x, n = 0; k < packs && n < kInFlight; k += blockDim.x, ++n) {
      m = larger(m, sample<kVector>(head + k * kVector));
    }
    for (int64_t j = tail() + threadIdx.x; j < p.width; j += blockDim.x) {
      m = larger(m, sample<1>(j));
    }
    return m;
  }

  template <int V>
  __device__ void take(Pack<A, V> logits, int64_t j) {
    if (smooth) add_logits(logits, j);
    leave_target_out(logits, j);
    const A peak = maximum(logits);
    if (peak > sums.reference + kSlack) raise(peak, j);
    Pack<A, V> exps;
    A pack_sum = 0;  // added to the row's sum once: fewer roundings of the large number
#pragma unroll
    for (int v = 0; v < V; ++v) {
      exps.values[v] = exponential(logits.values[v] - sums.reference);
      pack_sum += exps.values[v];
    }
    sums.e_sum += pack_sum;
    if (e != nullptr) store(exps, j);
  }

  template <int V>
  __device__ void add_logits(const Pack<A, V>& logits, int64_t j) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (j + v == target) continue;
      sums.z_sum += logits.values[v] * (class_weight == nullptr ? A(1) : class_weight[j + v]);
    }
  }

  template <int V>
  __device__ void store(const Pack<A, V>& exps, int64_t j) {
    Pack<E, V> narrow;
#pragma unroll
    for (int v = 0; v < V; ++v) narrow.values[v] = as_exponential<T>(exps.values[v]);
    store_pack<V>(e + j, narrow);
  }

  __device__ void take_all() {
    for (int64_t j = threadIdx.x; j < head; j += blockDim.x) take(load<1>(j), j);
    for (int64_t first = threadIdx.x; first < packs; first += int64_t{kInFlight} * blockDim.x) {
      Pack<A, kVector> logits[kInFlight];
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const int64_t k = first + int64_t{n} * blockDim.x;
        if (k < packs) logits[n] = load<kVector>(head + k * kVector);
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const int64_t k = first + int64_t{n} * blockDim.x;
        if (k < packs) take(logits[n], head + k * kVector);
      }
    }
    for (int64_t j = tail() + threadIdx.x; j < p.width; j += blockDim.x) take(load<1>(j), j);
  }

  // A logit far above the reference: make it the reference, for what this thread wrote before j
  // too.
  __device__ void raise(A reference, int64_t j) {
    const A factor = exponential(sums.reference - reference);
    sums.e_sum *= factor;
    sums.reference = reference;
    rescale(factor, j);
  }

  // Multiplies this thread's exponentials before element `end`.
  __device__ void rescale(A factor, int64_t end) {
    if (e == nullptr) return;
    for (int64_t j = threadIdx.x; j < head && j < end; j += blockDim.x) rescale<1>(factor, j);
    for (int64_t k = threadIdx.x; k < packs && head + k * kVector < end; k += blockDim.x) {
      rescale<kVector>(factor, head + k * kVector);
    }
    for (int64_t j = tail() + threadIdx.x; j < end; j += blockDim.x) rescale<1>(factor, j);
  }

  template <int V>
  __device__ void rescale(A factor, int64_t j) {
    const Pack<E, V> old = load_pack<V>(e + j);
    Pack<A, V> exps;
#pragma unroll
    for (int v = 0; v < V; ++v) exps.values[v] = static_cast<A>(old.values[v]) * factor;
    store(exps, j);
  }
};

// The loss of a row and what backward needs of it.
template <typename T>
__device__ void finish_row(const LossRows<T>& p, int64_t i, const MarginTerms& m,
                           const RowSums<double>& sums) {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const int64_t y = p.target[i];
  Smoothing q{1, static_cast<double>(p.c), p.label_smoothing, static_cast<double>(p.c)};
  if (p.class_weight != nullptr) {
    q.w_y = static_cast<double>(p.class_weight[y]);
    q.w_sum = p.label_smoothing > 0 ? static_cast<double>(*p.weight_sum) : 0;
  }
  const RowTerms terms = row_terms(m, sums, q);
  p.row_loss[i] = static_cast<A>(terms.loss);
  if (p.rows == nullptr) return;
  save_row(p.rows, p.n, i, terms, sums.reference);
  if (p.e != nullptr && p.target_in_e) p.e[i * p.e_stride + y] = static_cast<E>(terms.e_y);
}

// What chunks of classes hand on, in double so that any number of them adds up.
constexpr int kReference = 0, kESum = 1, kZSum = 2, kF = 3, kAlpha = 4, kBeta = 5, kGamma = 6;

template <typename T>
__device__ void save_state(const LossRows<T>& p, int64_t i, const MarginTerms& m,
                           const RowSums<double>& sums) {
  const double values[] = {sums.reference, sums.e_sum, sums.z_sum, m.f, m.alpha, m.beta, m.gamma};
  for (int k = 0; k < 7; ++k) p.state[k * p.n + i] = values[k];
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) loss_rows_kernel(LossRows<T> p) {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const int64_t i = blockIdx.x;
  E* e = p.e == nullptr ? nullptr : p.e + i * p.e_stride;
  const int64_t used = (p.width + 7) / 8 * 8, end = used < p.e_stride ? used : p.e_stride;
  if (i == p.n) return write_class_weights<T>(e, class_weights_at_hand(p), p.width, end);
  const bool first = p.first_class == 0, last = p.first_class + p.width == p.c;
  const bool ignored = p.target[i] == p.ignore_index;
  if (e != nullptr) {  // an ignored row may be NaN, and 0 * NaN is not 0: write the zeros
    for (int64_t j = (ignored ? 0 : p.width) + threadIdx.x; j < end; j += blockDim.x) {
      e[j] = static_cast<E>(0.0f);
    }
  }
  if (ignored) {
    if (threadIdx.x != 0) return;
    if (first && p.row_cosine != nullptr) p.row_cosine[i] = 0;
    if (!last) return;
    p.row_loss[i] = 0;
    for (int64_t k = 0; k < 5 && p.rows != nullptr; ++k) p.rows[k * p.n + i] = 0;
    return;
  }
  const int64_t y = p.target[i];
  const bool shard = p.row_loss == nullptr;
  CUDA_KERNEL_ASSERT(y >= (shard ? -1 : 0) && y < p.c);

  // Thread 0's, since double arithmetic is slow on many GPUs; not in its registers, of which the
  // logits need all.
  __shared__ SharedArray<MarginTerms, 1> margin;
  A start = kLowest<A>;
  if (first && y < 0) {
    if (threadIdx.x == 0) {
      margin[0] = MarginTerms{};
      if (p.row_cosine != nullptr) p.row_cosine[i] = 0;
    }
  } else if (first) {
    const Products sum = block_reduce(products(p.x + i * p.d, p.w + y * p.d, p.d), AddProducts{});
    if (threadIdx.x == 0) {
      const MarginTerms m =
          margin_terms(sum.dot, sum.xx, sum.ww, p.margin, static_cast<double>(*p.lam));
      margin[0] = m;
      if (!shard) start = static_cast<A>(m.f);
      if (p.row_cosine != nullptr) p.row_cosine[i] = static_cast<float>(cosine(sum));
    }
  } else if (threadIdx.x == 0) {
    margin[0] = MarginTerms{p.state[kF * p.n + i], p.state[kAlpha * p.n + i],
                            p.state[kBeta * p.n + i], p.state[kGamma * p.n + i]};
    start = static_cast<A>(p.state[kReference * p.n + i]);
  }
  start = block_broadcast(start);
  Row<T> row(p, i, e);
  row.sums.reference = Max{}(start, block_reduce(row.sample(), Max{}));
  row.take_all();
  const RowSums<A> sums = block_reduce(row.sums, MergeSums<A>{});
  if (row.sums.reference != sums.reference) {
    row.rescale(exponential(row.sums.reference - sums.reference), p.width);
  }
  __syncthreads();  // the target's column belongs to some thread, which may have rescaled it
  if (threadIdx.x != 0) return;
  RowSums<double> all{static_cast<double>(sums.reference), static_cast<double>(sums.e_sum),
                      static_cast<double>(sums.z_sum)};
  if (!first) {
    all = MergeSums<double>{}(
        all, {p.state[kReference * p.n + i], p.state[kESum * p.n + i], p.state[kZSum * p.n + i]});
  }
  const MarginTerms m = margin[0];
  last && !shard ? finish_row(p, i, m, all) : save_state(p, i, m, all);
}

}  // namespace

template <typename T>
cudaError_t launch_loss_rows(const LossRows<T>& params, cudaStream_t stream) {
  const int64_t longer = params.width > params.d ? params.width : params.d;
  const bool class_weights = params.e != nullptr && params.label_smoothing > 0;
  const int64_t blocks = params.n + (class_weights ? 1 : 0);
  if (blocks == 0) return cudaSuccess;
  return launch(loss_rows_kernel<T>, blocks, threads_for(longer), stream, params);
}

template cudaError_t launch_loss_rows(const LossRows<float>&, cudaStream_t);
template cudaError_t launch_loss_rows(const LossRows<double>&, cudaStream_t);
template cudaError_t launch_loss_rows(const LossRows<c10::Half>&, cudaStream_t);
template cudaError_t launch_loss_rows(const LossRows<c10::BFloat16>&, cudaStream_t);

}  // namespace lsoftmax
