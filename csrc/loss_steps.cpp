// The steps of the loss: each one kernel launch or one matrix product, with what it reads and
// writes.

#include "loss.h"

namespace lsoftmax {
namespace {

// Contiguous; and bfloat16, which Hopper's one kernel fetches in bulk, from a multiple of 16 bytes
// on. Hardly a matrix is not, but for parts of others.
Tensor as_rows(const Tensor& matrix) {
  const Tensor rows = matrix.contiguous();
  const bool begins_a_pack = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  return begins_a_pack || rows.scalar_type() != at::kBFloat16 ? rows : rows.clone();
}

}  // namespace

Loss check_loss(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing) {
  check_matrices(input, linear_weight, target);
  if (weight) {
    CHECK_SHAPE(*weight, {linear_weight.size(0)});
    CHECK_LIKE(*weight, input, accumulate_type(input));
  }
  return {as_rows(input),      as_rows(linear_weight),
          target.contiguous(), weight ? weight->contiguous() : Tensor(),
          ignore_index,        label_smoothing};
}

Margin check_margin(int64_t margin, const Tensor& lam, const Loss& loss) {
  check_margin(margin, lam, loss.x);
  const bool weighted = loss.smooth() && loss.class_weight.defined();
  return {static_cast<int>(margin), lam, weighted ? loss.class_weight.sum() : Tensor()};
}

Rows make_rows(const Loss& loss, bool save) {
  const auto wide = loss.wide();
  return {at::empty({loss.n()}, wide), at::empty({loss.n()}, wide.dtype(at::kFloat)),
          save ? at::empty({5, loss.n()}, wide) : Tensor()};
}

Panel make_panel(const Loss& loss, int64_t rows, int64_t stride, bool keep_e) {
  Tensor e;
  if (keep_e) {
    e = allocate("the exponentials", {loss.e_rows(rows), stride}, loss.e_options());
    if (loss.e_is_wide()) return {e, e};
  }
  return {allocate("the logits", {rows, stride}, loss.wide()), e};
}

void make_logits(const Loss& loss, const Panel& panel, int64_t first_class, int64_t width) {
  const Tensor w = width == loss.c() ? loss.w : loss.w.narrow(0, first_class, width);
  matmul(corner(panel.z, loss.n(), width), loss.x, w.t());
}

void matmul_e(const Loss& loss, const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const bool halves = loss.x.scalar_type() == at::kHalf;  // see as_exponential()
  halves ? matmul_tf32(out, a, b, add) : matmul(out, a, b, add);
}

void loss_rows(const Loss& loss, const Margin& margin, const Panel& panel, int64_t first_class,
               int64_t width, const Tensor& state, const Rows& rows, cudaStream_t stream) {
  for_type(loss.x, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Storage<T>::Acc;
    LossRows<T> params{};
    params.x = pointer<T>(loss.x);
    params.w = pointer<T>(loss.w);
    params.target = pointer<int64_t>(loss.y);
    params.lam = pointer<float>(margin.lam);
    params.class_weight = pointer<A>(loss.class_weight);
    params.weight_sum = pointer<A>(margin.weight_sum);
    params.z = mutable_pointer<A>(panel.z);
    params.e = mutable_pointer<typename Storage<T>::E>(panel.e);
    params.state = mutable_pointer<double>(state);
    params.row_loss = mutable_pointer<A>(rows.loss);
    params.rows = mutable_pointer<A>(rows.saved);
    params.row_cosine = mutable_pointer<float>(rows.cosine);
    params.n = loss.n();
    params.d = loss.d();
    params.c = loss.c();
    params.first_class = first_class;
    params.width = width;
    params.z_stride = panel.z.size(1);
    params.e_stride = panel.e.defined() ? panel.e.size(1) : 0;
    params.ignore_index = loss.ignore_index;
    params.label_smoothing = loss.label_smoothing;
    params.margin = margin.value;
    params.target_in_e = loss.target_in_e();
    C10_CUDA_CHECK(launch_loss_rows(params, stream));
  });
}

Panel forward_panel(const Loss& loss, int64_t stride, bool keep_e) {
  if (!can_fuse_forward(loss)) return make_panel(loss, loss.n(), stride, keep_e);
  if (!keep_e) return Panel();
  return {Tensor(), allocate("the exponentials", {loss.n(), stride}, loss.e_options())};
}

void forward(const Loss& loss, const Margin& margin, const Panel& panel, const Rows& rows,
             cudaStream_t stream) {
  if (!panel.z.defined()) return fused_forward(loss, margin, panel.e, rows, stream);
  if (loss.n() > 0) make_logits(loss, panel, 0, loss.c());
  loss_rows(loss, margin, panel, 0, loss.c(), Tensor(), rows, stream);
}

void loss_sum(const Loss& loss, bool mean, const Rows& rows, const Sums& sums,
              cudaStream_t stream) {
  const auto sum = [&](auto zero) {
    using A = decltype(zero);
    LossSum<A> params{};
    params.row_loss = pointer<A>(rows.loss);
    params.row_cosine = pointer<float>(rows.cosine);
    params.target = pointer<int64_t>(loss.y);
    params.class_weight = pointer<A>(loss.class_weight);
    params.loss = mutable_pointer<A>(sums.loss);
    params.divisor = mutable_pointer<A>(sums.divisor);
    params.cosine = mutable_pointer<float>(sums.cosine);
    params.n = loss.n();
    params.c = loss.c();
    params.ignore_index = loss.ignore_index;
    params.mean = mean;
    C10_CUDA_CHECK(launch_loss_sum(params, stream));
  };
  accumulate_type(loss.x) == at::kDouble ? sum(double{}) : sum(float{});
}

Upstream backward_rows(const Loss& loss, const Tensor& grad, const Tensor& divisor,
                       const Tensor& rows, bool need_weight, cudaStream_t stream) {
  const int64_t n = loss.n(), d = loss.d();
  Upstream out;
  out.shares = loss.shard ? rows : at::empty({5, n}, loss.wide());
  if (loss.shard && !need_weight) return out;
  bool sort = false;
  if (need_weight) {
    out.scaled_x = at::empty({loss.e_rows(n), d}, loss.e_options());
    std::tie(out.order, sort) = order_of(loss.y);
  }
  for_type(loss.x, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Storage<T>::Acc;
    BackwardRows<T> params{};
    params.grad = pointer<A>(grad);
    params.divisor = pointer<A>(divisor);
    params.rows = pointer<A>(rows);
    params.target = pointer<int64_t>(loss.y);
    params.x = pointer<T>(loss.x);
    params.shares = loss.shard ? nullptr : mutable_pointer<A>(out.shares);
    params.scaled_x = mutable_pointer<typename Storage<T>::E>(out.scaled_x);
    params.constant_x = need_weight && loss.smooth() ? params.scaled_x + n * d : nullptr;
    params.order = sort ? mutable_pointer<int64_t>(out.order) : nullptr;
    params.n = n;
    params.d = d;
    params.ignore_index = loss.ignore_index;
    params.grad_per_row = grad.defined() && grad.dim() == 1;
    params.constant = -loss.label_smoothing / static_cast<double>(loss.c());
    C10_CUDA_CHECK(launch_backward_rows(params, stream));
  });
  return out;
}

Shares Upstream::of(const Loss& loss) const {
  return {order,
          shares[0],
          shares[1],
          shares[2],
          loss.target_in_e() ? Tensor() : shares[3],
          loss.smooth() ? shares[4] : Tensor()};
}

}  // namespace lsoftmax
