// The host side of the annealing ops.

#include "engine.h"
#include "host.h"

namespace lsoftmax {
namespace {

void check_state(const Tensor& steps, const Tensor& share) {
  CHECK_SHAPE(steps, {});
  CHECK_LIKE(steps, steps, at::kLong);
  CHECK_SHAPE(share, {});
  CHECK_LIKE(share, steps, at::kFloat);
}

void check_number(const Tensor& number, const Tensor& steps) {
  CHECK_SHAPE(number, {});
  CHECK_LIKE(number, steps, at::kFloat);
}

}  // namespace

Tensor upcoming_lam(const Tensor& steps, const Tensor& share, double base, double gamma,
                    double power, double minimum, double least_share) {
  check_state(steps, share);
  const Scope scope(steps);
  const Tensor lam = at::empty({}, share.options());
  UpcomingLam params{};
  params.steps = pointer<int64_t>(steps);
  params.share = pointer<float>(share);
  params.lam = mutable_pointer<float>(lam);
  params.base = base;
  params.gamma = gamma;
  params.power = power;
  params.minimum = minimum;
  params.least_share = least_share;
  C10_CUDA_CHECK(launch_upcoming_lam(params, scope.stream));
  return lam;
}

void anneal_(const Tensor& steps, const Tensor& lam, const Tensor& share,
             const std::optional<Tensor>& next_lam, const std::optional<Tensor>& cosine,
             int64_t margin, double keep, double memory) {
  check_state(steps, share);
  check_number(lam, steps);
  if (next_lam) check_number(*next_lam, steps);
  if (cosine) check_number(*cosine, steps);
  const Scope scope(steps);
  Anneal params{};
  params.steps = mutable_pointer<int64_t>(steps);
  params.lam = mutable_pointer<float>(lam);
  params.share = mutable_pointer<float>(share);
  params.next_lam = next_lam ? pointer<float>(*next_lam) : nullptr;
  params.cosine = cosine ? pointer<float>(*cosine) : nullptr;
  params.keep = keep;
  params.memory = memory;
  params.margin = static_cast<int>(margin);
  C10_CUDA_CHECK(launch_anneal(params, scope.stream));
}

}  // namespace lsoftmax
