// The engine of the fused loss: workspaces and matrix products around the kernels.
//
// One regime so far, "in budget": the N x C logits fit. The row pass turns them into E, and
// backward is two products with E. A chunked regime belongs behind the same two functions.

#include "engine.h"
#include "host.h"

namespace lsoftmax {
namespace {

enum Reduction : int64_t { kNone, kMean, kSum };

// Rows of E as lsoftmax/portable.py's e_storage lays them out.
Tensor empty_e(const Tensor& input, int64_t rows, int64_t c) {
  const auto type = e_type(input);
  const int64_t stride = type == at::kBFloat16 ? (c + 7) / 8 * 8 : c;
  return at::empty({rows, stride}, input.options().dtype(type));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_fwd(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, int64_t margin,
    const Tensor& lam, const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, bool save) {
  check_matrices(input, linear_weight, target);
  check_margin(margin, lam, input);
  const auto acc = accumulate_type(input);
  const int64_t n = input.size(0), d = input.size(1), c = linear_weight.size(0);
  if (weight) {
    CHECK_SHAPE(*weight, {c});
    CHECK_LIKE(*weight, input, acc);
  }
  const Scope scope(input);
  const auto options = input.options().dtype(acc);
  const bool smooth = label_smoothing > 0;
  const Tensor x = input.contiguous(), w = linear_weight.contiguous(), y = target.contiguous();
  const Tensor class_weight = weight ? weight->contiguous() : Tensor();
  const Tensor weight_sum = weight && smooth ? class_weight.sum() : Tensor();

  Tensor e = save ? empty_e(x, n + (smooth ? 1 : 0), c) : at::empty({0}, options.dtype(e_type(x)));
  const bool in_place = save && e.scalar_type() == acc;
  // Padded like E, so that a pack of logits is a pack of exponentials.
  const Tensor z = in_place ? e : at::empty({n, save ? e.size(1) : c}, options);
  Tensor rows = save ? at::empty({4, n}, options) : at::empty({0}, options);
  Tensor loss = at::empty({n}, options);
  Tensor divisor;

  if (save && smooth) {  // one more row: the class weights, label smoothing's constant part
    Tensor last = e.select(0, n);
    last.zero_();
    weight ? last.narrow(0, 0, c).copy_(class_weight) : last.narrow(0, 0, c).fill_(1);
  }
  if (n > 0) {
    matmul(z.narrow(0, 0, n).narrow(1, 0, c), x, w.t());
    for_type(x, [&](auto zero) {
      using T = decltype(zero);
      using A = typename Storage<T>::Acc;
      LossRows<T> params{};
      params.x = pointer<T>(x);
      params.w = pointer<T>(w);
      params.target = pointer<int64_t>(y);
      params.lam = pointer<float>(lam);
      params.class_weight = pointer<A>(class_weight);
      params.weight_sum = pointer<A>(weight_sum);
      params.z = z.mutable_data_ptr<A>();
      params.e = save ? e.mutable_data_ptr<typename Storage<T>::E>() : nullptr;
      params.row_loss = loss.mutable_data_ptr<A>();
      params.rows = save ? rows.mutable_data_ptr<A>() : nullptr;
      params.n = n;
      params.d = d;
      params.c = c;
      params.z_stride = z.size(1);
      params.e_stride = save ? e.size(1) : 0;
      params.ignore_index = ignore_index;
      params.label_smoothing = label_smoothing;
      params.margin = static_cast<int>(margin);
      C10_CUDA_CHECK(launch_loss_rows(params, scope.stream));
    });
  }
  if (reduction == kNone) return {loss, e, rows, at::ones({}, options)};

  const Tensor row_loss = loss;
  loss = at::empty({}, options);
  divisor = at::empty({}, options);
  const auto sum = [&](auto zero) {
    using A = decltype(zero);
    LossSum<A> params{};
    params.row_loss = pointer<A>(row_loss);
    params.target = pointer<int64_t>(y);
    params.class_weight = pointer<A>(class_weight);
    params.loss = loss.mutable_data_ptr<A>();
    params.divisor = divisor.mutable_data_ptr<A>();
    params.n = n;
    params.ignore_index = ignore_index;
    params.mean = reduction == kMean;
    C10_CUDA_CHECK(launch_loss_sum(params, scope.stream));
  };
  acc == at::kDouble ? sum(double{}) : sum(float{});
  return {loss, e, rows, divisor};
}

std::tuple<Tensor, Tensor> loss_bwd(const Tensor& grad, const Tensor& input,
                                    const Tensor& linear_weight, const Tensor& target,
                                    const Tensor& e, const Tensor& rows, const Tensor& divisor,
                                    int64_t ignore_index, double label_smoothing, bool need_input,
                                    bool need_weight) {
  check_matrices(input, linear_weight, target);
  const auto acc = accumulate_type(input);
  const int64_t n = input.size(0), d = input.size(1), c = linear_weight.size(0);
  CHECK_LIKE(grad, input, acc);
  CHECK_SHAPE(rows, {4, n});
  const Scope scope(input);
  const bool smooth = label_smoothing > 0;
  const int64_t e_rows = n + (smooth ? 1 : 0);
  TORCH_CHECK(e.dim() == 2 && e.size(0) == e_rows && e.size(1) >= c, "e: expected ", e_rows,
              " rows of at least ", c, ", got ", e.sizes());

  Tensor dx, dw;
  const Tensor none = at::empty({0}, input.options());
  if (n == 0) {
    return {need_input ? at::empty_like(input) : none,
            need_weight ? at::zeros_like(linear_weight) : none};
  }
  const Tensor x = input.contiguous(), w = linear_weight.contiguous(), y = target.contiguous();
  const Tensor g = grad.contiguous();
  const Tensor shares = at::empty({5, n}, rows.options());
  const Tensor scaled_x = need_weight ? at::empty({e_rows, d}, e.options()) : Tensor();
  const double constant = -label_smoothing / static_cast<double>(c);
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Storage<T>::Acc;
    using E = typename Storage<T>::E;
    BackwardRows<T> params{};
    params.grad = pointer<A>(g);
    params.divisor = pointer<A>(divisor);
    params.rows = pointer<A>(rows);
    params.target = pointer<int64_t>(y);
    params.x = pointer<T>(x);
    params.shares = shares.mutable_data_ptr<A>();
    params.scaled_x = need_weight ? scaled_x.mutable_data_ptr<E>() : nullptr;
    params.n = n;
    params.d = d;
    params.ignore_index = ignore_index;
    params.grad_per_row = grad.dim() == 1;
    params.constant = constant;
    C10_CUDA_CHECK(launch_backward_rows(params, scope.stream));
    if (!need_weight || !smooth) return;
    ConstantRow<T> sum{};
    sum.x = params.x;
    sum.constant = params.shares + 4 * n;
    sum.sum = params.scaled_x + n * d;
    sum.n = n;
    sum.d = d;
    C10_CUDA_CHECK(launch_constant_row(sum, scope.stream));
  });

  const Tensor e_used = e.narrow(1, 0, c);
  Tensor product;
  if (need_input) {
    product = at::empty({e_rows, d}, rows.options());
    matmul(product, e_used, w.to(e.scalar_type()));
    dx = x.scalar_type() == acc ? product.narrow(0, 0, n) : at::empty_like(x);
  }
  if (need_weight) {
    dw = at::empty_like(w, e.options());
    matmul(dw, e_used.t(), scaled_x);
  }
  const bool narrow = e.scalar_type() != acc;  // then the target's part is not in E
  finish_gradients(x, w, y, shares[0], shares[1], shares[2], narrow ? shares[3] : Tensor(),
                   smooth ? shares[4] : Tensor(), product, dx, dw, scope.stream);
  return {need_input ? dx : none, need_weight ? dw.to(w.scalar_type()) : none};
}

}  // namespace lsoftmax
