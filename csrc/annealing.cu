// A training step's annealing, a launch before the loss and one after it: lsoftmax/schedule.py's
// formulas on 0-dim tensors would be some twenty launches.

#include "block.cuh"
#include "lsoftmax.h"

namespace lsoftmax {
namespace {

__global__ void upcoming_lam_kernel(UpcomingLam p) {
  const double step = static_cast<double>(*p.steps + 1);
  double lam = fmax(p.minimum, p.base * pow(1 + p.gamma * step, -p.power));
  if (p.least_share > 0) {
    lam = fmax(lam, 1 / fmax(static_cast<double>(*p.share), p.least_share) - 1);
  }
  *p.lam = static_cast<float>(lam);
}

__global__ void anneal_kernel(Anneal p) {
  if (p.next_lam != nullptr) {
    *p.steps += 1;
    *p.lam = *p.next_lam;
    if (p.keep < 0) *p.share = static_cast<float>(1 / (1 + static_cast<double>(*p.lam)));
  }
  if (p.cosine == nullptr || isinf(*p.cosine)) return;
  constexpr double kPi = 3.14159265358979323846;
  // fmax takes the number where the other is NaN: no angle at all.
  const double c = fmin(fmax(static_cast<double>(*p.cosine), 0.0), 1.0);
  const double taken = c - 1 + 2 * p.margin / kPi * acos(c);  // cos - psi
  const double allowed = fmin((1 - p.keep) * c / fmax(taken, 1e-6), 1.0);
  const double share = static_cast<double>(*p.share);
  *p.share = static_cast<float>(share + (1 - p.memory) * (allowed - share));
}

}  // namespace

cudaError_t launch_upcoming_lam(const UpcomingLam& params, cudaStream_t stream) {
  return launch(upcoming_lam_kernel, 1, 1, stream, params);
}

cudaError_t launch_anneal(const Anneal& params, cudaStream_t stream) {
  return launch(anneal_kernel, 1, 1, stream, params);
}

}  // namespace lsoftmax
