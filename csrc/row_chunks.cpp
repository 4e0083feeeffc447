// The loss over budget, a chunk of rows at a time, with the gradients formed in forward while a
// chunk's exponentials are at hand: 6 N C D flops, and a loss that is one number.
//
// The gradients are for an upstream gradient of 1 and stay in the accumulate type, so that backward
// only multiplies. dW is summed over the chunks in float32, 16-bit factors or not.

#include "engine.h"
#include "loss.h"

namespace lsoftmax {

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradients(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, int64_t margin,
    const Tensor& lam, const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, int64_t row_chunk, bool need_input, bool need_weight) {
  const Scope scope(input);
  const Loss loss = check_loss(input, linear_weight, target, weight, ignore_index, label_smoothing);
  const Margin terms = check_margin(margin, lam, loss);
  TORCH_CHECK(row_chunk > 0, "row_chunk: expected >= 1, got ", row_chunk);
  TORCH_CHECK(reduction == kMean || reduction == kSum, "reduction: expected mean or sum, got ",
              reduction);
  const auto wide = loss.wide();
  const int64_t n = loss.n(), d = loss.d(), c = loss.c(), chunk = std::min(row_chunk, n);
  const bool mean = reduction == kMean;

  const Tensor none = at::empty({0}, wide);
  const Tensor dx = need_input ? at::empty({n, d}, wide) : none;
  Tensor dw = none;
  if (need_weight) dw = allocate("the float32 gradient of linear_weight", {c, d}, wide);
  const Rows rows = make_rows(loss, /*save=*/false);
  const Sums sums{at::empty({}, wide), Tensor(), at::empty({}, rows.cosine.options())};
  // Of the whole batch, before the first chunk's gradients need it.
  const Tensor divisor = at::empty({}, wide);
  loss_sum(loss, mean, Rows(), {Tensor(), divisor, Tensor()}, scope.stream);
  if (n == 0 && need_weight) dw.zero_();
  const Panel panel =
      n > 0 ? forward_panel(loss.rows(0, chunk), padded(c), /*keep_e=*/true) : Panel();
  const Tensor w_factor = loss.w.to(e_type(loss.x));

  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t count = std::min(chunk, n - first), e_rows = loss.e_rows(count);
    const Loss part = loss.rows(first, count);
    const Tensor saved = at::empty({5, count}, wide);
    forward(part, terms, panel, rows.part(first, count, saved), scope.stream);
    const Upstream upstream =
        backward_rows(part, Tensor(), divisor, saved, need_weight, scope.stream);
    const Tensor e = corner(panel.e, e_rows, c);
    Tensor product, dx_part, dw_sum;
    if (need_input) {
      product = at::empty({e_rows, d}, wide);
      dx_part = dx.narrow(0, first, count);
      matmul_e(loss, product, e, w_factor);
    }
    if (need_weight) {
      dw_sum = dw;
      matmul_e(loss, dw, e.t(), upstream.scaled_x, /*add=*/first > 0);
    }
    finish_gradients(part.x, part.w, part.y, upstream.of(part), product, dx_part, dw_sum, 0,
                     /*wide=*/true, scope.stream);
  }
  loss_sum(loss, mean, rows, sums, scope.stream);
  return {sums.loss, dx, dw, sums.cosine};
}

}  // namespace lsoftmax
