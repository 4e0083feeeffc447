// The loss of a shard of the classes: forward leaves the sums of each row, which the processes add
// up, and backward starts from what came of all of them. Meanings: lsoftmax/portable_shard.py.
//
// To the steps of the loss a shard is few classes, with targets of -1 for those of other shards.

#include <limits>

#include "engine.h"
#include "loss.h"

namespace lsoftmax {
namespace {

Loss check_shard(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                 const std::optional<Tensor>& smoothing, int64_t class_chunk) {
  TORCH_CHECK(class_chunk >= 0, "class_chunk: expected >= 0, got ", class_chunk);
  constexpr int64_t kNoneIgnored = std::numeric_limits<int64_t>::min();
  // How much smoothing there is, is in the rows that backward gets: here it matters that there is.
  Loss loss = check_loss(input, linear_weight, target, smoothing, kNoneIgnored, smoothing ? 1 : 0);
  loss.shard = true;
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> shard_fwd(const Tensor& input, const Tensor& linear_weight,
                                             const Tensor& target, int64_t margin,
                                             const Tensor& lam,
                                             const std::optional<Tensor>& smoothing, bool save,
                                             int64_t class_chunk) {
  const Scope scope(input);
  const Loss loss = check_shard(input, linear_weight, target, smoothing, class_chunk);
  check_margin(margin, lam, loss.x);
  const Margin terms{static_cast<int>(margin), lam, Tensor()};
  const int64_t n = loss.n(), c = loss.c();
  const int64_t chunk = class_chunk > 0 ? std::min(class_chunk, c) : c;
  const bool keep_e = save && class_chunk == 0;
  const bool whole_packs = !keep_e || !loss.e_is_wide();  // as in loss_fwd
  const Panel panel = make_panel(loss, n, whole_packs ? padded(chunk) : c, keep_e);
  const Tensor sums = at::empty({7, n}, loss.wide().dtype(at::kDouble));
  const Rows rows{Tensor(), at::empty({n}, loss.wide().dtype(at::kFloat)), Tensor()};
  for (int64_t first = 0; first < c; first += chunk) {
    const int64_t width = std::min(chunk, c - first);
    if (n > 0) make_logits(loss, panel, first, width);
    loss_rows(loss, terms, panel, first, width, sums, rows, scope.stream);
  }
  return {keep_e ? panel.e : at::empty({0}, loss.e_options()), sums, rows.cosine};
}

std::tuple<Tensor, Tensor> shard_bwd(const Tensor& rows, const Tensor& input,
                                     const Tensor& linear_weight, const Tensor& target,
                                     const std::optional<Tensor>& smoothing, const Tensor& e,
                                     const Tensor& reference, int64_t class_chunk, bool need_input,
                                     bool need_weight) {
  const Scope scope(input);
  const Loss loss = check_shard(input, linear_weight, target, smoothing, class_chunk);
  CHECK_LIKE(reference, input, accumulate_type(input));
  CHECK_SHAPE(reference, {loss.n()});
  const Backward args{Tensor(), Tensor(),    rows.contiguous(), reference.contiguous(),
                      e,        class_chunk, need_input,        need_weight};
  const auto [dx, dw] = backward(loss, args, scope.stream);
  return {need_input ? dx : at::empty({0}, loss.wide()),
          need_weight ? dw : at::empty({0}, loss.x.options())};
}

}  // namespace lsoftmax
