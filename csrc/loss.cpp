// The loss in budget: the N x C logits fit. The row pass turns them into E, and backward is two
// products with E. Where they do not fit, class_chunks.cpp and row_chunks.cpp take over.

#include "loss.h"
#include "engine.h"

namespace lsoftmax {
namespace {

// From E as forward left it.
std::pair<Tensor, Tensor> backward_in_budget(const Loss& loss, const Backward& args,
                                             const Upstream& upstream, cudaStream_t stream) {
  const Tensor e = corner(args.e, loss.e_rows(loss.n()), loss.c());
  const Shares shares = upstream.of(loss);
  Tensor product, dx, dw;
  if (args.need_input) {
    product = allocate("a product", {e.size(0), loss.d()}, loss.wide());
    matmul_e(loss, product, e, loss.w.to(e.scalar_type()));
    const bool in_place = loss.shard || loss.x.scalar_type() == product.scalar_type();
    dx = in_place ? product.narrow(0, 0, loss.n()) : at::empty_like(loss.x);
  }
  if (args.need_weight) {
    dw = allocate("the gradient of linear_weight", loss.w.sizes(), e.options());
    matmul_e(loss, dw, e.t(), upstream.scaled_x);
  }
  const auto finish = [&](const Tensor& dx_product, const Tensor& dx_part, const Tensor& dw_part,
                          bool wide) {
    finish_gradients(loss.x, loss.w, loss.y, shares, dx_product, dx_part, dw_part, 0, wide, stream);
  };
  if (!loss.shard) {
    finish(product, dx, dw, /*wide=*/false);
  } else {  // one launch has one type, and a shard's dX is wider than its dW
    if (args.need_input) finish(product, dx, Tensor(), /*wide=*/true);
    if (args.need_weight) finish(Tensor(), Tensor(), dw, /*wide=*/false);
  }
  return {dx, args.need_weight ? dw.to(loss.w.scalar_type()) : dw};
}

}  // namespace

std::pair<Tensor, Tensor> backward(const Loss& loss, const Backward& args, cudaStream_t stream) {
  const int64_t n = loss.n(), c = loss.c(), e_rows = loss.e_rows(n);
  CHECK_LIKE(args.rows, loss.x, accumulate_type(loss.x));
  CHECK_SHAPE(args.rows, {5, n});
  TORCH_CHECK(args.class_chunk > 0 ||
                  (args.e.dim() == 2 && args.e.size(0) == e_rows && args.e.size(1) >= c),
              "e: expected ", e_rows, " rows of at least ", c, ", got ", args.e.sizes());
  if (n == 0) {
    const auto options = loss.shard ? loss.wide() : loss.x.options();
    return {args.need_input ? at::empty(loss.x.sizes(), options) : Tensor(),
            args.need_weight ? at::zeros_like(loss.w) : Tensor()};
  }
  const Upstream upstream =
      backward_rows(loss, args.grad, args.divisor, args.rows, args.need_weight, stream);
  return args.class_chunk > 0 ? backward_class_chunks(loss, args, upstream, stream)
                              : backward_in_budget(loss, args, upstream, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_fwd(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, int64_t margin,
    const Tensor& lam, const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, bool save, int64_t class_chunk) {
  const Scope scope(input);
  const Loss loss = check_loss(input, linear_weight, target, weight, ignore_index, label_smoothing);
  const Margin terms = check_margin(margin, lam, loss);
  TORCH_CHECK(class_chunk >= 0, "class_chunk: expected >= 0, got ", class_chunk);
  const bool keep_e = save && class_chunk == 0;

  Tensor e;
  const Rows rows = make_rows(loss, save);
  if (class_chunk > 0) {
    forward_class_chunks(loss, terms, class_chunk, rows, scope.stream);
  } else {
    // As lsoftmax/portable.py's e_storage has it: rows of bfloat16 are whole 16-byte packs.
    const int64_t c = loss.c();
    const Panel panel = forward_panel(loss, loss.e_is_wide() ? c : padded(c), keep_e);
    e = panel.e;
    forward(loss, terms, panel, rows, scope.stream);
  }
  if (!keep_e) e = at::empty({0}, loss.e_options());
  const Tensor saved = save ? rows.saved : at::empty({0}, loss.wide());
  Sums sums{Tensor(), at::empty({}, loss.wide()), at::empty({}, rows.cosine.options())};
  if (reduction != kNone) sums.loss = at::empty({}, loss.wide());
  loss_sum(loss, reduction == kMean, rows, sums, scope.stream);
  return {reduction == kNone ? rows.loss : sums.loss, e, saved, sums.divisor, sums.cosine};
}

std::tuple<Tensor, Tensor> loss_bwd(const Tensor& grad, const Tensor& input,
                                    const Tensor& linear_weight, const Tensor& target,
                                    const std::optional<Tensor>& weight, const Tensor& e,
                                    const Tensor& rows, const Tensor& divisor, int64_t ignore_index,
                                    double label_smoothing, int64_t class_chunk, bool need_input,
                                    bool need_weight) {
  const Scope scope(input);
  const Loss loss = check_loss(input, linear_weight, target, weight, ignore_index, label_smoothing);
  const int64_t n = loss.n();
  CHECK_LIKE(grad, input, accumulate_type(input));
  TORCH_CHECK(grad.dim() == 0 || (grad.dim() == 1 && grad.size(0) == n),
              "grad: expected shape () or (", n, "), got ", grad.sizes());
  const Backward args{grad.contiguous(), divisor,    rows,       Tensor(), e,
                      class_chunk,       need_input, need_weight};
  const auto [dx, dw] = backward(loss, args, scope.stream);
  const Tensor none = dx.defined() && dw.defined() ? Tensor() : at::empty({0}, input.options());
  return {dx.defined() ? dx : none, dw.defined() ? dw : none};
}

}  // namespace lsoftmax
