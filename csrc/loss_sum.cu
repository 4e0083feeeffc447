// The loss of a batch from the losses of its rows, the divisor of its mean, and what annealing
// goes by: the mean cosine less one standard deviation, as lsoftmax/rows.py has it.

#include <c10/macros/Macros.h>

#include "block.cuh"
#include "lsoftmax.h"

namespace lsoftmax {
namespace {

struct BatchSums {
  double loss, weight, cosine, square, kept;
};

struct AddSums {
  __device__ BatchSums operator()(const BatchSums& p, const BatchSums& q) const {
    return {p.loss + q.loss, p.weight + q.weight, p.cosine + q.cosine, p.square + q.square,
            p.kept + q.kept};
  }
};

// One block, a fixed order: the same bits in every run.
template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads) loss_sum_kernel(LossSum<Acc> p) {
  BatchSums sum{0, 0, 0, 0, 0};
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    if (p.row_loss != nullptr) sum.loss += static_cast<double>(p.row_loss[i]);
    if (p.row_cosine != nullptr) {
      const double cosine = static_cast<double>(p.row_cosine[i]);
      sum.cosine += cosine;
      sum.square += cosine * cosine;
    }
    const int64_t y = p.target[i];
    if (y != p.ignore_index) {
      CUDA_KERNEL_ASSERT(y >= 0 && y < p.c);
      sum.kept += 1;
      sum.weight += p.class_weight == nullptr ? 1 : static_cast<double>(p.class_weight[y]);
    }
  }
  sum = block_reduce(sum, AddSums{});
  if (threadIdx.x != 0) return;
  const double divisor = p.mean ? sum.weight : 1;
  if (p.loss != nullptr) *p.loss = static_cast<Acc>(sum.loss / divisor);
  if (p.cosine != nullptr) {
    const double mean = sum.cosine / sum.kept, variance = sum.square / sum.kept - mean * mean;
    const double low = mean - sqrt(fabs(variance));  // rounding may be below 0
    *p.cosine = sum.kept > 0 ? static_cast<float>(low) : INFINITY;
  }
  if (p.divisor != nullptr) *p.divisor = static_cast<Acc>(divisor);
}

}  // namespace

template <typename Acc>
cudaError_t launch_loss_sum(const LossSum<Acc>& params, cudaStream_t stream) {
  return launch(loss_sum_kernel<Acc>, 1, threads_for_each(params.n), stream, params);
}

template cudaError_t launch_loss_sum(const LossSum<float>&, cudaStream_t);
template cudaError_t launch_loss_sum(const LossSum<double>&, cudaStream_t);

}  // namespace lsoftmax
