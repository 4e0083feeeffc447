// One call of the loss, checked, and the steps that its regimes are made of.
#pragma once

#include "host.h"

namespace lsoftmax {

enum Reduction : int64_t { kNone, kMean, kSum };

struct Loss {
  Tensor x, w, y;       // contiguous
  Tensor class_weight;  // contiguous, or undefined: all 1
  int64_t ignore_index;
  double label_smoothing;
  bool shard = false;  // of the classes: see shard.cpp

  int64_t n() const { return x.size(0); }
  int64_t d() const { return x.size(1); }
  int64_t c() const { return w.size(0); }
  bool smooth() const { return label_smoothing > 0; }
  // With label smoothing there is one more row of E, the class weights, and so of what meets it.
  int64_t e_rows(int64_t rows) const { return rows + (smooth() ? 1 : 0); }
  at::TensorOptions wide() const { return x.options().dtype(accumulate_type(x)); }
  at::TensorOptions e_options() const { return x.options().dtype(e_type(x)); }
  bool e_is_wide() const { return e_type(x) == accumulate_type(x); }
  // Whether the products with E take the target's part along. Not where E has fewer digits than its
  // row's numbers (float16's has 11), nor where there are many classes: the target's exponential is
  // about the sum of all others', and a float that holds the one loses digits of each other that is
  // added. There it is added after the products: see FinishGradients, which for few classes has
  // long sums to do. Nor in a shard: its share of a row's exponentials, the unit of E, may vanish.
  bool target_in_e() const {
    return !shard && e_is_wide() && x.scalar_type() != at::kHalf && c() <= 1024;
  }

  Loss rows(int64_t first, int64_t count) const {
    Loss part = *this;
    part.x = x.narrow(0, first, count);
    part.y = y.narrow(0, first, count);
    return part;
  }
};

Loss check_loss(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing);

// What the forward pass alone needs to know.
struct Margin {
  int value;
  Tensor lam;         // ()
  Tensor weight_sum;  // (), of the class weights; undefined without them or without smoothing
};

Margin check_margin(int64_t margin, const Tensor& lam, const Loss& loss);

// What the forward pass leaves of each row.
struct Rows {
  Tensor loss;    // (N,)
  Tensor cosine;  // (N,), float32
  Tensor saved;   // (5, N), for backward; undefined where there is none

  Rows part(int64_t first, int64_t count, const Tensor& saved_part) const {
    return {loss.narrow(0, first, count), cosine.narrow(0, first, count), saved_part};
  }
};

Rows make_rows(const Loss& loss, bool save);

// Room for the logits of some rows and classes, and for the exponentials they become.
struct Panel {
  Tensor z;  // (rows, stride); undefined where fused_forward() makes E without them
  Tensor e;  // (rows, or with label smoothing rows + 1, stride), in place of z where types allow;
             // undefined: not kept
};

// Whole packs to a row, which kernels and matrix units like best.
inline int64_t padded(int64_t classes) { return (classes + 7) / 8 * 8; }

Panel make_panel(const Loss& loss, int64_t rows, int64_t stride, bool keep_e);

// The first `rows` rows and `columns` columns.
inline Tensor corner(const Tensor& matrix, int64_t rows, int64_t columns) {
  return matrix.as_strided({rows, columns}, {matrix.size(1), 1});
}

// Logits of the classes [first_class, first_class + width), into panel.z.
void make_logits(const Loss& loss, const Panel& panel, int64_t first_class, int64_t width);

// out = a b, or out += a b, of which one is E or a part of it.
void matmul_e(const Loss& loss, const Tensor& out, const Tensor& a, const Tensor& b,
              bool add = false);

// LossRows. `state` is undefined where all classes come at once. Of a shard `rows` holds nothing.
void loss_rows(const Loss& loss, const Margin& margin, const Panel& panel, int64_t first_class,
               int64_t width, const Tensor& state, const Rows& rows, cudaStream_t stream);

// make_logits and loss_rows in one kernel, where device, type and options allow and it is faster,
// or the user wants it. `e` (N, padded(C)) is undefined where only the loss is wanted.
bool can_fuse_forward(const Loss& loss);
void fused_forward(const Loss& loss, const Margin& margin, const Tensor& e, const Rows& rows,
                   cudaStream_t stream);
// Floats that fused_forward needs a row, beside E.
int64_t fused_forward_columns(const Loss& loss);
// The exponentials of some classes once more, against the references (N,) that forward chose.
void fused_exponentials(const Loss& loss, const Tensor& reference, const Tensor& e,
                        int64_t first_class, int64_t width, cudaStream_t stream);

// Room for what forward() makes of all classes at once.
Panel forward_panel(const Loss& loss, int64_t stride, bool keep_e);

// The numbers of all rows, and panel.e where it is there, by the way the panel was made for.
void forward(const Loss& loss, const Margin& margin, const Panel& panel, const Rows& rows,
             cudaStream_t stream);

// What the batch comes to; each (), and undefined where it is not wanted.
struct Sums {
  Tensor loss, divisor, cosine;
};

// LossSum. What it does not sum of `rows` may be undefined.
void loss_sum(const Loss& loss, bool mean, const Rows& rows, const Sums& sums, cudaStream_t stream);

// BackwardRows, and what FinishGradients wants of it.
struct Upstream {
  Tensor shares;    // (5, N)
  Tensor scaled_x;  // (e_rows(N), D), as wide as E; undefined without need_weight, as is order
  Tensor order;     // (N,)

  Shares of(const Loss& loss) const;
};

// An undefined `grad` is 1. Of a shard there is no divisor either: the rows have it all.
Upstream backward_rows(const Loss& loss, const Tensor& grad, const Tensor& divisor,
                       const Tensor& rows, bool need_weight, cudaStream_t stream);

// The over-budget regime of loss_fwd: fills `rows`.
void forward_class_chunks(const Loss& loss, const Margin& margin, int64_t class_chunk,
                          const Rows& rows, cudaStream_t stream);

// What loss_bwd and shard_bwd are given, beside the loss.
struct Backward {
  Tensor grad, divisor, rows;  // as backward_rows() takes them
  Tensor reference;            // (N,), of Exponentials; undefined: the last of the rows
  Tensor e;                    // as forward left it, in budget
  int64_t class_chunk;         // 0: in budget
  bool need_input, need_weight;
};

// dX, of a shard in the accumulate type, and dW; undefined where not needed.
std::pair<Tensor, Tensor> backward(const Loss& loss, const Backward& args, cudaStream_t stream);

// The same in chunks of classes, of one row or more.
std::pair<Tensor, Tensor> backward_class_chunks(const Loss& loss, const Backward& args,
                                                const Upstream& upstream, cudaStream_t stream);

}  // namespace lsoftmax
