// The host side of the logits op.

#include "engine.h"
#include "host.h"

namespace lsoftmax {

std::tuple<Tensor, Tensor, Tensor> linear_fwd(const Tensor& input, const Tensor& linear_weight,
                                              const Tensor& target, int64_t margin,
                                              const Tensor& lam) {
  check_matrices(input, linear_weight, target);
  check_margin(margin, lam, input);
  const Scope scope(input);
  const Tensor x = input.contiguous(), w = linear_weight.contiguous(), y = target.contiguous();
  // Of the tensors as they came, so that the other logits are F.linear's bit for bit.
  Tensor logits = at::linear(input, linear_weight).contiguous();
  Tensor coefficients = at::empty({3, x.size(0)}, x.options().dtype(accumulate_type(x)));
  const Tensor row_cosine = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  const Tensor cosine = at::empty({}, row_cosine.options());
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Storage<T>::Acc;
    MarginLogits<T> params{};
    params.x = pointer<T>(x);
    params.w = pointer<T>(w);
    params.target = pointer<int64_t>(y);
    params.lam = pointer<float>(lam);
    params.logits = logits.mutable_data_ptr<T>();
    params.coefficients = coefficients.mutable_data_ptr<A>();
    params.row_cosine = mutable_pointer<float>(row_cosine);
    params.n = x.size(0);
    params.d = x.size(1);
    params.c = w.size(0);
    params.margin = static_cast<int>(margin);
    if (params.n > 0) C10_CUDA_CHECK(launch_margin_logits(params, scope.stream));
  });
  LossSum<float> low{};
  low.row_cosine = pointer<float>(row_cosine);
  low.target = pointer<int64_t>(y);
  low.cosine = mutable_pointer<float>(cosine);
  low.n = x.size(0);
  low.c = w.size(0);
  low.ignore_index = -1;  // no target is negative
  C10_CUDA_CHECK(launch_loss_sum(low, scope.stream));
  return {logits, coefficients, cosine};
}

std::tuple<Tensor, Tensor> linear_bwd(const Tensor& grad, const Tensor& input,
                                      const Tensor& linear_weight, const Tensor& target,
                                      const Tensor& coefficients, bool need_input,
                                      bool need_weight) {
  check_matrices(input, linear_weight, target);
  const int64_t n = input.size(0), c = linear_weight.size(0);
  CHECK_SHAPE(grad, {n, c});
  CHECK_LIKE(grad, input, input.scalar_type());
  CHECK_SHAPE(coefficients, {3, n});
  const Scope scope(input);
  Tensor dx, dw;
  const Tensor none = at::empty({0}, input.options());
  if (n == 0) {
    return {need_input ? at::empty(input.sizes(), input.options()) : none,
            need_weight ? at::zeros(linear_weight.sizes(), linear_weight.options()) : none};
  }
  const Tensor x = input.contiguous(), w = linear_weight.contiguous(), y = target.contiguous();
  const Tensor g = grad.contiguous();
  const Tensor shares = at::empty({3, n}, coefficients.options());
  const auto [order, sort] = need_weight ? order_of(y) : std::pair(Tensor(), false);
  int64_t* const unsorted = sort ? order.mutable_data_ptr<int64_t>() : nullptr;
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Storage<T>::Acc;
    MarginLogitsBackward<T> params{};
    params.target = pointer<int64_t>(y);
    params.coefficients = pointer<A>(coefficients);
    params.grad = pointer<T>(g);
    params.shares = shares.mutable_data_ptr<A>();
    params.order = unsorted;
    params.n = n;
    params.c = c;
    C10_CUDA_CHECK(launch_margin_logits_backward(params, scope.stream));
  });
  Tensor product;
  if (need_input) {
    product = at::empty(x.sizes(), coefficients.options());
    matmul(product, g, w);
    dx = x.scalar_type() == product.scalar_type() ? product : at::empty_like(x);
  }
  if (need_weight) {
    dw = at::empty_like(w, w.options().dtype(e_type(x)));
    matmul(dw, g.t(), x);
  }
  const Shares all{order, Tensor(), shares[0], shares[1], shares[2], Tensor()};
  finish_gradients(x, w, y, all, product, dx, dw, 0, /*wide=*/false, scope.stream);
  return {need_input ? dx : none, need_weight ? dw.to(w.scalar_type()) : none};
}

}  // namespace lsoftmax
