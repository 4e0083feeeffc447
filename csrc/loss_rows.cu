// Forward of the fused loss: one block turns one row of logits into E, the loss and three numbers.
//
// Fused, because a pass over N x C costs most of a matrix product at the sizes that matter: the
// norms, the cosine, the bucket, psi and the log-sum-exp of a row need its logits once. A logit is
// read once and its exponential written once, so the exponentials are taken against a reference
// chosen before the row's maximum is known: the larger of f and the maximum of the row's first
// packs. Range allows e^+-80 around it. A thread that meets a logit more than kSlack above its
// reference raises it, and rescales what it has written; at the end all threads agree on the
// largest reference, and those below it rescale. Both are rare, and the result is exact either way.

#include <c10/macros/Macros.h>

#include "block.cuh"
#include "lsoftmax.h"
#include "margin.cuh"

namespace lsoftmax {
namespace {

constexpr int kSlack = 40;    // e^40 times 10^7 classes is far inside float32 and bfloat16
constexpr int kInFlight = 4;  // packs a thread loads before it works on the first

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

template <typename A>
struct Max {
  __device__ A operator()(A p, A q) const { return p > q ? p : q; }
};

// Sums of exponentials against `reference`, over others than the target.
template <typename A>
struct RowSums {
  A reference, e_sum, z_sum;
};

template <typename A>
struct MergeSums {
  __device__ RowSums<A> operator()(const RowSums<A>& p, const RowSums<A>& q) const {
    const A r = p.reference > q.reference ? p.reference : q.reference;
    const A e_sum = scaled(p, r) + scaled(q, r);
    return {r, e_sum, p.z_sum + q.z_sum};
  }
  // Equal references (the usual case) also stay exact where they are infinite.
  __device__ static A scaled(const RowSums<A>& p, A r) {
    return p.reference == r ? p.e_sum : p.e_sum * exponential(p.reference - r);
  }
};

// The packs of one row: a scalar head up to a 16-byte boundary of the logits, packs, a scalar tail.
// Thread t owns packs t, t + blockDim, ... and the head and tail elements of its number.
template <typename T>
struct Row {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  static constexpr int kVector = 16 / sizeof(A);

  const LossRows<T>& p;
  const A* z;
  E* e;
  int64_t target, head, packs;
  RowSums<A> sums;

  __device__ Row(const LossRows<T>& params, int64_t i)
      : p(params),
        z(params.z + i * params.z_stride),
        e(params.e == nullptr ? nullptr : params.e + i * params.e_stride),
        target(params.target[i]),
        head(misaligned_head(z, params.c)),
        packs((params.c - head) / kVector),
        sums{0, 0, 0} {}

  __device__ int64_t tail() const { return head + packs * kVector; }

  template <int V>
  __device__ Pack<A, V> load(int64_t j) const {
    return load_pack<V>(z + j);
  }

  template <int V>
  __device__ A maximum(const Pack<A, V>& logits, int64_t j) const {
    A m = -INFINITY;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (logits.values[v] > m && j + v != target) m = logits.values[v];
    }
    return m;
  }

  // The largest of this thread's first few logits.
  __device__ A sample() const {
    A m = -INFINITY;
    const Max<A> larger;
    for (int64_t j = threadIdx.x; j < head; j += blockDim.x) m = larger(m, maximum(load<1>(j), j));
    for (int64_t k = threadIdx.x, n = 0; k < packs && n < kInFlight; k += blockDim.x, ++n) {
      m = larger(m, maximum(load<kVector>(head + k * kVector), head + k * kVector));
    }
    for (int64_t j = tail() + threadIdx.x; j < p.c; j += blockDim.x) {
      m = larger(m, maximum(load<1>(j), j));
    }
    return m;
  }

  template <int V>
  __device__ void take(const Pack<A, V>& logits, int64_t j) {
    const A peak = maximum(logits, j);
    if (peak > sums.reference + kSlack) raise(peak, j);
    Pack<A, V> exps;
    A pack_sum = 0;  // added to the row's sum once: fewer roundings of the large number
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool other = j + v != target;
      exps.values[v] = other ? exponential(logits.values[v] - sums.reference) : A(0);
      pack_sum += exps.values[v];
      if (p.label_smoothing > 0 && other) {
        sums.z_sum += logits.values[v] * (p.class_weight == nullptr ? A(1) : p.class_weight[j + v]);
      }
    }
    sums.e_sum += pack_sum;
    if (e != nullptr) store(exps, j);
  }

  template <int V>
  __device__ void store(const Pack<A, V>& exps, int64_t j) {
    Pack<E, V> narrow;
#pragma unroll
    for (int v = 0; v < V; ++v) narrow.values[v] = static_cast<E>(exps.values[v]);
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
    for (int64_t j = tail() + threadIdx.x; j < p.c; j += blockDim.x) take(load<1>(j), j);
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

// The loss of a row and what backward needs of it; see lsoftmax/portable.py for the formulas.
template <typename T>
__device__ void finish_row(const LossRows<T>& p, int64_t i, Row<T>& row, const MarginTerms& m,
                           const RowSums<typename Storage<T>::Acc>& sums) {
  using A = typename Storage<T>::Acc;
  // f as it is, not as the row's reference rounded it: E_y and beta x nearly cancel, so what goes
  // into the one must be what went into the other.
  const double r = static_cast<double>(sums.reference);
  const double e_sum = static_cast<double>(sums.e_sum);
  const double gap = log(e_sum) + r - m.f;  // L - f: loss = softplus(gap), p_y - 1 = -sigmoid(gap)
  const double softplus = gap > 0 ? gap + log1p(exp(-gap)) : log1p(exp(gap));
  const double s = e_sum + exp(m.f - r);
  const double t = gap > 0 ? -1 / (1 + exp(-gap)) : -exp(gap) / (1 + exp(gap));

  const double w_y =
      p.class_weight == nullptr ? 1 : static_cast<double>(p.class_weight[row.target]);
  double loss = w_y * softplus, grad_y = w_y * t, total = w_y, constant = 0;
  if (p.label_smoothing > 0) {
    const double share = p.label_smoothing / static_cast<double>(p.c);
    const double w_sum =
        p.class_weight == nullptr ? static_cast<double>(p.c) : static_cast<double>(*p.weight_sum);
    total = (1 - p.label_smoothing) * w_y + share * w_sum;
    loss = (1 - p.label_smoothing) * loss +
           share * (w_sum * (m.f + softplus) - static_cast<double>(sums.z_sum) - w_y * m.f);
    grad_y = total * t + share * (w_sum - w_y);
    constant = share * w_y;
  }
  p.row_loss[i] = static_cast<A>(loss);
  if (row.e == nullptr) return;
  const double target_share = grad_y * m.alpha + constant;
  using E = typename Storage<T>::E;
  if constexpr (sizeof(E) == sizeof(A)) {
    // Into E, in units of scale = total / s. Without smoothing this is -e_sum alpha.
    const double e_y =
        p.label_smoothing > 0 ? target_share * s / (total == 0 ? 1 : total) : -e_sum * m.alpha;
    row.e[row.target] = static_cast<E>(e_y);
  }
  p.rows[i] = static_cast<A>(total / s);
  p.rows[p.n + i] = static_cast<A>(grad_y * m.beta);
  p.rows[2 * p.n + i] = static_cast<A>(grad_y * m.gamma);
  p.rows[3 * p.n + i] = static_cast<A>(target_share);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) loss_rows_kernel(LossRows<T> p) {
  using A = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const int64_t i = blockIdx.x;
  Row<T> row(p, i);
  const bool ignored = row.target == p.ignore_index;
  if (row.e != nullptr) {  // an ignored row may be NaN, and 0 * NaN is not 0: write the zeros
    for (int64_t j = (ignored ? 0 : p.c) + threadIdx.x; j < p.e_stride; j += blockDim.x) {
      row.e[j] = static_cast<E>(0.0f);
    }
  }
  if (ignored) {
    if (threadIdx.x == 0) {
      p.row_loss[i] = 0;
      for (int64_t k = 0; k < 4 && row.e != nullptr; ++k) p.rows[k * p.n + i] = 0;
    }
    return;
  }
  CUDA_KERNEL_ASSERT(row.target >= 0 && row.target < p.c);

  const Products sum =
      block_reduce(products(p.x + i * p.d, p.w + row.target * p.d, p.d), AddProducts{});
  MarginTerms m{};
  if (threadIdx.x == 0) {  // double arithmetic is slow on many GPUs: once a row
    m = margin_terms(sum.dot, sum.xx, sum.ww, p.margin, static_cast<double>(*p.lam));
  }
  const A f = block_broadcast(static_cast<A>(m.f));
  row.sums.reference = Max<A>{}(f, block_reduce(row.sample(), Max<A>{}));
  row.take_all();
  const RowSums<A> sums = block_reduce(row.sums, MergeSums<A>{});
  if (row.sums.reference != sums.reference) {
    row.rescale(exponential(row.sums.reference - sums.reference), p.c);
  }
  __syncthreads();  // the target's column belongs to some thread, which may have rescaled it
  if (threadIdx.x == 0) finish_row(p, i, row, m, sums);
}

struct LossAndWeight {
  double loss, weight;
};

struct AddLosses {
  __device__ LossAndWeight operator()(const LossAndWeight& p, const LossAndWeight& q) const {
    return {p.loss + q.loss, p.weight + q.weight};
  }
};

// One block, a fixed order: the same bits in every run.
template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads) loss_sum_kernel(LossSum<Acc> p) {
  LossAndWeight sum{0, 0};
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    sum.loss += static_cast<double>(p.row_loss[i]);
    const int64_t y = p.target[i];
    if (y != p.ignore_index) {
      sum.weight += p.class_weight == nullptr ? 1 : static_cast<double>(p.class_weight[y]);
    }
  }
  sum = block_reduce(sum, AddLosses{});
  if (threadIdx.x != 0) return;
  const double divisor = p.mean ? sum.weight : 1;
  *p.loss = static_cast<Acc>(sum.loss / divisor);
  *p.divisor = static_cast<Acc>(divisor);
}

}  // namespace

template <typename T>
cudaError_t launch_loss_rows(const LossRows<T>& params, cudaStream_t stream) {
  const int64_t longer = params.c > params.d ? params.c : params.d;
  return launch(loss_rows_kernel<T>, params.n, threads_for(longer), stream, params);
}

template <typename Acc>
cudaError_t launch_loss_sum(const LossSum<Acc>& params, cudaStream_t stream) {
  return launch(loss_sum_kernel<Acc>, 1, threads_for(params.n), stream, params);
}

template cudaError_t launch_loss_rows(const LossRows<float>&, cudaStream_t);
template cudaError_t launch_loss_rows(const LossRows<double>&, cudaStream_t);
template cudaError_t launch_loss_rows(const LossRows<c10::Half>&, cudaStream_t);
template cudaError_t launch_loss_rows(const LossRows<c10::BFloat16>&, cudaStream_t);
template cudaError_t launch_loss_sum(const LossSum<float>&, cudaStream_t);
template cudaError_t launch_loss_sum(const LossSum<double>&, cudaStream_t);

}  // namespace lsoftmax
