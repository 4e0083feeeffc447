// The logits op: the target's column of X W^T becomes the margin logit, and its gradient.

#include <c10/macros/Macros.h>

#include "block.cuh"
#include "lsoftmax.h"
#include "margin.cuh"
#include "order.cuh"

namespace lsoftmax {
namespace {

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) margin_logits_kernel(MarginLogits<T> p) {
  using A = typename Storage<T>::Acc;
  const int64_t i = blockIdx.x;
  const int64_t y = p.target[i];
  CUDA_KERNEL_ASSERT(y >= 0 && y < p.c);
  const Products sum = block_reduce(products(p.x + i * p.d, p.w + y * p.d, p.d), AddProducts{});
  if (threadIdx.x != 0) return;
  const double lam = static_cast<double>(*p.lam);
  const MarginTerms m = margin_terms(sum.dot, sum.xx, sum.ww, p.margin, lam);
  p.logits[i * p.c + y] = static_cast<T>(static_cast<A>(m.f));
  p.coefficients[i] = static_cast<A>(m.alpha);
  p.coefficients[p.n + i] = static_cast<A>(m.beta);
  p.coefficients[2 * p.n + i] = static_cast<A>(m.gamma);
  p.row_cosine[i] = static_cast<float>(cosine(sum));
}

// The matrix products see the target's logit with a slope of 1, not alpha.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    margin_logits_backward_kernel(MarginLogitsBackward<T> p) {
  using A = typename Storage<T>::Acc;
  const int64_t i = blockIdx.x;
  if (p.order != nullptr) write_order(p.order, p.target, p.n, i);
  if (threadIdx.x != 0) return;
  const A g = static_cast<A>(p.grad[i * p.c + p.target[i]]);
  p.shares[i] = g * p.coefficients[p.n + i];
  p.shares[p.n + i] = g * p.coefficients[2 * p.n + i];
  p.shares[2 * p.n + i] = g * (p.coefficients[i] - 1);
}

}  // namespace

template <typename T>
cudaError_t launch_margin_logits(const MarginLogits<T>& params, cudaStream_t stream) {
  return launch(margin_logits_kernel<T>, params.n, threads_for(params.d), stream, params);
}

template <typename T>
cudaError_t launch_margin_logits_backward(const MarginLogitsBackward<T>& params,
                                          cudaStream_t stream) {
  const int threads = threads_for(params.order == nullptr ? 1 : params.n);
  return launch(margin_logits_backward_kernel<T>, params.n, threads, stream, params);
}

#define LSOFTMAX_INSTANTIATE(T)                                                    \
  template cudaError_t launch_margin_logits(const MarginLogits<T>&, cudaStream_t); \
  template cudaError_t launch_margin_logits_backward(const MarginLogitsBackward<T>&, cudaStream_t);
LSOFTMAX_INSTANTIATE(float)
LSOFTMAX_INSTANTIATE(double)
LSOFTMAX_INSTANTIATE(c10::Half)
LSOFTMAX_INSTANTIATE(c10::BFloat16)
#undef LSOFTMAX_INSTANTIATE

}  // namespace lsoftmax
