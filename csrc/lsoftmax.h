// What the host code and the kernels agree on: launchers, and every pointer with its shape.
//
// N rows, D features, C classes; all arrays row-major. T is the type of features and weights.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace lsoftmax {

// Acc: logits, row statistics, losses. E: what backward's matrix products read. bfloat16 spans the
// range of an exponential and float16 does not, so float16 keeps E in float.
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

template <typename T>
struct LossRows {
  using Acc = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const T* x;               // (N, D)
  const T* w;               // (C, D)
  const int64_t* target;    // (N,)
  const float* lam;         // ()
  const Acc* class_weight;  // (C,), or null: all 1
  const Acc* weight_sum;    // (), sum of class_weight; read with label smoothing only
  Acc* z;                   // (N, z_stride), C used: the logits
  E* e;                     // (N, e_stride), C used, the rest set to 0; may be z; null: only read
  Acc* row_loss;            // (N,)
  Acc* rows;                // (4, N): scale; input, weight and target share; null where e is
  int64_t n, d, c, z_stride, e_stride;
  int64_t ignore_index;
  double label_smoothing;
  int margin;
};

// Margin, exponentials, loss and backward's row statistics of each row of logits.
template <typename T>
cudaError_t launch_loss_rows(const LossRows<T>& params, cudaStream_t stream);

template <typename Acc>
struct LossSum {
  const Acc* row_loss;      // (N,)
  const int64_t* target;    // (N,)
  const Acc* class_weight;  // (C,), or null
  Acc* loss;                // ()
  Acc* divisor;             // ()
  int64_t n, ignore_index;
  bool mean;
};

// Sum, or mean over the kept targets' weights, of the row losses; and what it was divided by.
template <typename Acc>
cudaError_t launch_loss_sum(const LossSum<Acc>& params, cudaStream_t stream);

template <typename T>
struct BackwardRows {
  using Acc = typename Storage<T>::Acc;
  using E = typename Storage<T>::E;
  const Acc* grad;        // () or (N,)
  const Acc* divisor;     // ()
  const Acc* rows;        // (4, N), of the forward pass
  const int64_t* target;  // (N,)
  const T* x;             // (N, D)
  Acc* shares;            // (5, N): the four rows and the constant share, times the gradient
  E* scaled_x;            // (N, D): scale_i x_i; null: not needed
  int64_t n, d, ignore_index;
  bool grad_per_row;
  double constant;  // -label_smoothing / C
};

// The upstream gradient, folded into the row statistics and, for dW, into X.
template <typename T>
cudaError_t launch_backward_rows(const BackwardRows<T>& params, cudaStream_t stream);

template <typename T>
struct ConstantRow {
  const T* x;                                // (N, D)
  const typename Storage<T>::Acc* constant;  // (N,)
  typename Storage<T>::E* sum;               // (D,): sum of constant_i x_i
  int64_t n, d;
};

// Label smoothing's constant gradient has rank one: this is its feature side, one more row of X.
template <typename T>
cudaError_t launch_constant_row(const ConstantRow<T>& params, cudaStream_t stream);

template <typename T>
struct FinishGradients {
  using Acc = typename Storage<T>::Acc;
  const T* x;             // (N, D)
  const T* w;             // (C, D)
  const int64_t* target;  // (N,)
  const Acc* scale;       // (N,), or null: 1
  const Acc* input;       // (N,)
  const Acc* weight;      // (N,)
  const Acc* rest;        // (N,), target share that is not in the products; or null: it is there
  const Acc* constant;    // (N,), or null: no constant part
  const Acc* product;     // (N, D), or (N + 1, D) with a constant part; may be dx; null: no dx
  T* dx;                  // (N, D): scale product + input x + rest w_y + constant product_N
  // In the type of the product it holds: what is added may cancel it.
  typename Storage<T>::E* dw;  // (C, D), added to: sum of weight w_c + rest x over class c; or null
  int64_t n, d, c;
};

template <typename T>
cudaError_t launch_finish_gradients(const FinishGradients<T>& params, cudaStream_t stream);

template <typename T>
struct MarginLogits {
  using Acc = typename Storage<T>::Acc;
  const T* x;             // (N, D)
  const T* w;             // (C, D)
  const int64_t* target;  // (N,)
  const float* lam;       // ()
  T* logits;              // (N, C): column y is overwritten
  Acc* coefficients;      // (3, N): alpha, beta, gamma
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
  int64_t n, c;
};

template <typename T>
cudaError_t launch_margin_logits_backward(const MarginLogitsBackward<T>& params,
                                          cudaStream_t stream);

}  // namespace lsoftmax
