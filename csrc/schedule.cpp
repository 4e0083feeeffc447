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

Tensor own_cosines(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                   int64_t ignore_index) {
  check_matrices(input, linear_weight, target);
  const Scope scope(input);
  const Tensor x = input.contiguous(), w = linear_weight.contiguous(), y = target.contiguous();
  const Tensor cosines = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    OwnCosines<T> params{};
    params.x = pointer<T>(x);
    params.w = pointer<T>(w);
    params.target = pointer<int64_t>(y);
    params.cosines = mutable_pointer<float>(cosines);
    params.n = x.size(0);
    params.d = x.size(1);
    params.c = w.size(0);
    params.ignore_index = ignore_index;
    if (params.n > 0) C10_CUDA_CHECK(launch_own_cosines(params, scope.stream));
  });
  return cosines;
}

Tensor count_classes_(const Tensor& classes, const Tensor& cosines, const Tensor& target,
                      double memory) {
  TORCH_CHECK(classes.dim() == 2 && classes.size(1) > 0,
              "classes: expected shape (2, C) with C >= 1, got ", classes.sizes());
  const int64_t c = classes.size(1), n = cosines.numel();
  CHECK_SHAPE(classes, {2, c});
  CHECK_LIKE(classes, classes, at::kFloat);
  TORCH_CHECK(classes.is_contiguous(), "classes: expected them contiguous, for they are changed");
  CHECK_SHAPE(cosines, {n});
  CHECK_LIKE(cosines, classes, at::kFloat);
  CHECK_SHAPE(target, {n});
  CHECK_LIKE(target, classes, at::kLong);
  const Scope scope(classes);
  const Tensor rows = cosines.contiguous(), y = target.contiguous();
  constexpr int64_t kClassesABlock = 2048, kMostBlocks = 512;
  const int64_t blocks = std::min((c + kClassesABlock - 1) / kClassesABlock, kMostBlocks);
  const Tensor sums = at::zeros({3, c}, y.options());
  const Tensor partial = at::empty({blocks, 4}, classes.options().dtype(at::kDouble));
  const Tensor low = at::empty({}, classes.options());
  ClassCosines params{};
  params.classes = mutable_pointer<float>(classes);
  params.cosines = pointer<float>(rows);
  params.target = pointer<int64_t>(y);
  params.sums = mutable_pointer<int64_t>(sums);
  params.partial = reinterpret_cast<ClassSums*>(mutable_pointer<double>(partial));
  params.low = mutable_pointer<float>(low);
  params.n = n;
  params.c = c;
  params.partials = blocks;
  params.memory = memory;
  C10_CUDA_CHECK(launch_class_cosines(params, scope.stream));
  return low;
}

}  // namespace lsoftmax
