// What the host code and the kernels agree on: launchers, and every pointer with its shape.
//
// N rows, D features, C classes; all arrays row-major. T is the type of features and weights.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

namespace lsoftmax {

// Acc: logits, row statistics, losses. E: what backward's matrix products read. bfloat16 spans the
// range of an exponential and float16 does not, so float16 keeps E in float, with float16's digits.
template <typename T>
struct Storage {
  using Acc = float;
  using E = float;
};
template <>
struct Storage<double> {
  using Acc = double;
  using E = double;
};
template <>
struct Storage<c10::BFloat16> {
  using Acc = float;
  using E = c10::BFloat16;
};

// Some or all classes' logits at a time: those of `width` classes from first_class on, with chunks
// in ascending order. Only where all come at once is E kept. Without row_loss the classes are a
// shard: a target of -1 is in another, and the state, also of the last chunk, is what is wanted.
template <typename T>
struct LossRows {
  using Acc = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const T* x;               // (N, D)
  const T* w;               // (C, D), all classes
  const int64_t* target;    // (N,)
  const float* lam;         // ()
  const Acc* class_weight;  // (C,), or null: all 1
  const Acc* weight_sum;    // (), sum of class_weight; read with label smoothing only
  Acc* z;                   // (N, z_stride), width used: the logits
  E* e;                     // (N, e_stride), or (N + 1, e_stride) with label smoothing, the last
         // row for the class weights; width used, up to 7 more set to 0; may be z;
         // null: only read
  double* state;      // (7, N), from chunk to chunk; null: there is one
  Acc* row_loss;      // (N,), with the last chunk, and so
  Acc* rows;          // (5, N): scale; input, weight and target share; reference; or null
  float* row_cosine;  // (N,), with the first chunk: of x_i and w_y, 0 without w_y; or null
  int64_t n, d, c, first_class, width, z_stride, e_stride;
  int64_t ignore_index;
  double label_smoothing;
  int margin;
  bool target_in_e;  // the target's part of the gradient in its column of E, else 0
};

// Margin, exponentials, loss and backward's row statistics of each row of logits.
template <typename T>
cudaError_t launch_loss_rows(const LossRows<T>& params, cudaStream_t stream);

template <typename T>
struct Exponentials {
  using Acc = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const int64_t* target;    // (N,)
  const Acc* reference;     // (N,), r of loss_rows
  const Acc* rows;          // (5, N), of loss_rows; null: 0 in the target's column of E
  const Acc* class_weight;  // (C,), or null
  const Acc* z;             // (N, stride), width used: the logits of classes first_class on
  E* e;                     // as in LossRows; may be z
  int64_t n, first_class, width, stride;  // stride: a multiple of 16 bytes, as z and e are
  int64_t ignore_index;
  bool class_weights;  // write the last row of E
};

// E of a chunk of classes once more, for backward. What is beyond width is not set.
template <typename T>
cudaError_t launch_exponentials(const Exponentials<T>& params, cudaStream_t stream);

template <typename Acc>
struct LossSum {
  const Acc* row_loss;      // (N,); null where loss is
  const float* row_cosine;  // (N,); null where cosine is
  const int64_t* target;    // (N,)
  const Acc* class_weight;  // (C,), or null
  Acc* loss;                // (), or null
  Acc* divisor;             // (), or null
  float* cosine;            // (), or null
  int64_t n, c, ignore_index;
  bool mean;
};

// Sum, or mean over the kept targets' weights, of the row losses; what it was divided by; and the
// mean cosine of the kept rows less one standard deviation, inf where there is none.
template <typename Acc>
cudaError_t launch_loss_sum(const LossSum<Acc>& params, cudaStream_t stream);

template <typename T>
struct BackwardRows {
  using Acc = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const Acc* grad;        // () or (N,); null: 1
  const Acc* divisor;     // ()
  const Acc* rows;        // (5, N), of the forward pass
  const int64_t* target;  // (N,)
  const T* x;             // (N, D)
  Acc* shares;            // (5, N): the first four rows and the constant share, times the gradient;
                          // null: these are what `rows` holds
  E* scaled_x;            // (N, D): scale_i x_i; null: not needed
  E* constant_x;          // (D,): sum of constant_i x_i, one more row of scaled_x; null: not needed
  int64_t* order;         // (N,): the rows sorted by target; null: not needed. N^2 comparisons.
  int64_t n, d, ignore_index;
  bool grad_per_row;
  double constant;  // -label_smoothing / C
};

// The upstream gradient, folded into the row statistics and, for dW, into X.
template <typename T>
cudaError_t launch_backward_rows(const BackwardRows<T>& params, cudaStream_t stream);

// kWide: gradients are kept in the accumulate type, whatever the type of what they belong to.
template <typename T, bool kWide>
struct FinishGradients {
  using Acc = typename Storage<T>::Acc;
  using DX = std::conditional_t<kWide, Acc, T>;
  // In the type of the product it holds: what is added may cancel it.
  using DW = std::conditional_t<kWide, Acc, typename Storage<T>::E>;
  const T* x;             // (N, D)
  const T* w;             // (C, D), all classes
  const int64_t* target;  // (N,)
  const int64_t* order;   // (N,): the rows sorted by target, equal ones in their order
  const Acc* scale;       // (N,), or null: 1
  const Acc* input;       // (N,)
  const Acc* weight;      // (N,)
  const Acc* rest;        // (N,), target share that is not in the products; or null: it is there
  const Acc* constant;    // (N,), or null: no constant part
  const Acc* product;     // (N, D), or (N + 1, D) with a constant part; may be dx; null: no dx
  DX* dx;                 // (N, D): scale product + input x + rest w_y + constant product_N
  DW* dw;                 // (width, D), of classes first_class on; null: no dw
                          // added to: sum of weight w_c + rest x over the rows of class c
  int64_t n, d, first_class, width;
};

template <typename T, bool kWide>
cudaError_t launch_finish_gradients(const FinishGradients<T, kWide>& params, cudaStream_t stream);

template <typename T>
struct MarginLogits {
  using Acc = typename Storage<T>::Acc;
  const T* x;             // (N, D)
  const T* w;             // (C, D)
  const int64_t* target;  // (N,)
  const float* lam;       // ()
  T* logits;              // (N, C): column y is overwritten
  Acc* coefficients;      // (3, N): alpha, beta, gamma
  float* row_cosine;      // (N,): of x_i and w_y
  int64_t n, d, c;
  int margin;
};

template <typename T>
cudaError_t launch_margin_logits(const MarginLogits<T>& params, cudaStream_t stream);

template <typename T>
struct MarginLogitsBackward {
  using Acc = typename Storage<T>::Acc;
  const int64_t* target;    // (N,)
  const Acc* coefficients;  // (3, N)
  const T* grad;            // (N, C)
  Acc* shares;              // (3, N): input, weight and target share
  int64_t* order;           // (N,): as of BackwardRows
  int64_t n, c;
};

template <typename T>
cudaError_t launch_margin_logits_backward(const MarginLogitsBackward<T>& params,
                                          cudaStream_t stream);

// Annealing, as lsoftmax/schedule.py has it: the curve, and what holds it up.
struct UpcomingLam {
  const int64_t* steps;  // (), taken so far
  const float* share;    // (), the largest 1 / (1 + lam) that the angles allow
  float* lam;            // (), of the next step
  double base, gamma, power, minimum;
  double least_share;  // that `share` counts for; 0: it counts for nothing
};

cudaError_t launch_upcoming_lam(const UpcomingLam& params, cudaStream_t stream);

struct Anneal {
  int64_t* steps;
  float* lam;
  float* share;           // (), each
  const float* next_lam;  // (), of the step that is taken; null: none is
  const float* cosine;    // (), of a batch; null, or inf: nothing was measured
  double keep;            // < 0: share follows lam
  double memory;          // of the running mean over batches
  int margin;
};

// A training step's change of a schedule, in place.
cudaError_t launch_anneal(const Anneal& params, cudaStream_t stream);

template <typename T>
struct OwnCosines {
  const T* x;             // (N, D)
  const T* w;             // (C, D)
  const int64_t* target;  // (N,)
  float* cosines;         // (N,): of x_i and w_y, 0 of a zero row, inf of an ignored one
  int64_t n, d, c, ignore_index;
};

template <typename T>
cudaError_t launch_own_cosines(const OwnCosines<T>& params, cudaStream_t stream);

// Over some classes: of the running means, of those that ever came, and of those in the batch.
struct ClassSums {
  double mean, square, known, came;
};

struct ClassCosines {
  float* classes;         // (2, C): the mean cosine and mean square of each class, -1 before any
  const float* cosines;   // (N,), of OwnCosines
  const int64_t* target;  // (N,); anything where the cosine is inf
  int64_t* sums;  // (3, C), 0: of each class its rows, and their cosines and squares as integers
  ClassSums* partial;  // (partials,)
  float* low;          // (): the mean over classes less one deviation, inf without a row
  int64_t n, c, partials;
  double memory;  // of the running means, over the batches that a class is in
};

// A batch into the running means of its classes, in place, and what they say then.
cudaError_t launch_class_cosines(const ClassCosines& params, cudaStream_t stream);

}  // namespace lsoftmax
