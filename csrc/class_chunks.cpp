// The loss over budget, a chunk of classes at a time: nothing of size N x C exists.
//
// Forward keeps running sums of each row and no exponentials; backward makes them again, chunk by
// chunk, which is one product more (8 N C D flops in all). Each slice of dW is written once; dX is
// summed over the chunks in float32, whatever the type of the features. Where one kernel makes
// exponentials out of features, forward needs no chunks, and backward's hold no logits.

#include "loss.h"

namespace lsoftmax {

void forward_class_chunks(const Loss& loss, const Margin& margin, int64_t class_chunk,
                          const Rows& rows, cudaStream_t stream) {
  const int64_t n = loss.n(), c = loss.c(), chunk = std::min(class_chunk, c);
  if (n == 0) return;
  if (can_fuse_forward(loss) && fused_forward_columns(loss) <= padded(chunk)) {
    return fused_forward(loss, margin, Tensor(), rows, stream);
  }
  const Panel panel = make_panel(loss, n, padded(chunk), /*keep_e=*/false);
  const Tensor state =
      chunk < c ? at::empty({7, n}, loss.x.options().dtype(at::kDouble)) : Tensor();
  for (int64_t first = 0; first < c; first += chunk) {
    const int64_t width = std::min(chunk, c - first);
    make_logits(loss, panel, first, width);
    loss_rows(loss, margin, panel, first, width, state, rows, stream);
  }
}

namespace {

// The exponentials of a chunk, out of panel.z.
void exponentials(const Loss& loss, const Tensor& rows, const Tensor& reference, const Panel& panel,
                  int64_t first_class, int64_t width, cudaStream_t stream) {
  for_type(loss.x, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Storage<T>::Acc;
    Exponentials<T> params{};
    params.target = pointer<int64_t>(loss.y);
    params.reference = pointer<A>(reference);
    params.rows = loss.target_in_e() ? pointer<A>(rows) : nullptr;
    params.class_weight = pointer<A>(loss.class_weight);
    params.z = pointer<A>(panel.z);
    params.e = mutable_pointer<typename Storage<T>::E>(panel.e);
    params.n = loss.n();
    params.first_class = first_class;
    params.width = width;
    params.stride = panel.z.size(1);
    params.ignore_index = loss.ignore_index;
    params.class_weights = loss.smooth();
    C10_CUDA_CHECK(launch_exponentials(params, stream));
  });
}

}  // namespace

std::pair<Tensor, Tensor> backward_class_chunks(const Loss& loss, const Backward& args,
                                                const Upstream& upstream, cudaStream_t stream) {
  const int64_t n = loss.n(), d = loss.d(), c = loss.c(), chunk = std::min(args.class_chunk, c);
  const int64_t e_rows = loss.e_rows(n);
  const Tensor &x = loss.x, &w = loss.w;
  const Tensor reference = args.reference.defined() ? args.reference : args.rows[4];
  Loss part = loss;  // a chunk's classes: what they are to be computed by
  part.w = w.narrow(0, 0, chunk);
  const Panel panel = forward_panel(part, padded(chunk), /*keep_e=*/true);
  const bool fused = !panel.z.defined();
  const auto e_type = panel.e.scalar_type();
  Tensor dx, dw, product, slice;
  if (args.need_input) product = allocate("a product", {e_rows, d}, loss.wide());
  if (args.need_weight) {
    dw = allocate("the gradient of linear_weight", w.sizes(), w.options());
    if (w.scalar_type() != e_type) slice = at::empty({chunk, d}, panel.e.options());
  }
  const Shares shares = upstream.of(loss);

  for (int64_t first = 0; first < c; first += chunk) {
    const int64_t width = std::min(chunk, c - first);
    if (fused) {
      fused_exponentials(loss, reference, panel.e, first, width, stream);
    } else {
      make_logits(loss, panel, first, width);
      exponentials(loss, args.rows, reference, panel, first, width, stream);
    }
    const Tensor e = corner(panel.e, e_rows, width);
    if (args.need_input) {
      matmul_e(loss, product, e, w.narrow(0, first, width).to(e_type), /*add=*/first > 0);
    }
    if (!args.need_weight) continue;
    const Tensor dw_slice = dw.narrow(0, first, width);
    const Tensor sum = slice.defined() ? slice.narrow(0, 0, width) : dw_slice;
    matmul_e(loss, sum, e.t(), upstream.scaled_x);
    finish_gradients(x, w, loss.y, shares, Tensor(), Tensor(), sum, first, /*wide=*/false, stream);
    if (slice.defined()) dw_slice.copy_(sum);
  }
  if (args.need_input) {
    const bool in_place = loss.shard || x.scalar_type() == product.scalar_type();
    dx = in_place ? product.narrow(0, 0, n) : at::empty_like(x);
    finish_gradients(x, w, loss.y, shares, product, dx, Tensor(), 0, /*wide=*/loss.shard, stream);
  }
  return {dx, dw};
}

}  // namespace lsoftmax
