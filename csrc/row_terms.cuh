// From the sums over a row of logits to its loss and to what backward multiplies by the upstream
// gradient of the row. The formulas are derived in docs/mathematics.md and lsoftmax/rows.py.
#pragma once

#include "margin.cuh"

namespace lsoftmax {

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

// How far above its reference a logit may be: e^40 times 10^7 classes is far inside float32 and
// bfloat16.
constexpr int kSlack = 40;

// Sums of exponentials against `reference`, over others than the target.
template <typename A>
struct RowSums {
  A reference, e_sum, z_sum;
};

template <typename A>
struct MergeSums {
  __device__ RowSums<A> operator()(const RowSums<A>& p, const RowSums<A>& q) const {
    const A r = p.reference > q.reference ? p.reference : q.reference;
    const A e_sum = scaled(p, r) + scaled(q, r);
    return {r, e_sum, p.z_sum + q.z_sum};
  }
  // Equal references (the usual case) also stay exact where they are infinite.
  __device__ static A scaled(const RowSums<A>& p, A r) {
    return p.reference == r ? p.e_sum : p.e_sum * exponential(p.reference - r);
  }
};

// The target distribution of a row: its class, or with label smoothing all of them.
struct Smoothing {
  double w_y;    // class weight of the target
  double w_sum;  // of all classes
  double epsilon, c;
};

struct RowTerms {
  double loss;
  double scale;  // of the row's exponentials
  double input_share,
      weight_share;     // of x_i in dx_i, of w_y in dw_y: the norms' share of the margin
  double target_share;  // of w_y in dx_i and of x_i in dw_y
  double e_y;           // the same as an exponential, that is, in units of scale
};

__device__ inline RowTerms row_terms(const MarginTerms& m, const RowSums<double>& sums,
                                     const Smoothing& q) {
  // f as it is, not as the row's reference rounded it: E_y and beta x nearly cancel, so what goes
  // into the one must be what went into the other. But above it by no more than the slack: a logit
  // of 1e10 is rounded by hundreds, and exp(hundreds) is no unit for E.
  const double r = sums.reference, e_sum = sums.e_sum;
  const double f = m.f > r + kSlack ? r + kSlack : m.f;
  const double gap = log(e_sum) + r - f;  // L - f: loss = softplus(gap), p_y - 1 = -sigmoid(gap)
  const double softplus = gap > 0 ? gap + log1p(exp(-gap)) : log1p(exp(gap));
  // Without other exponentials any unit serves, and exp(f - r) may be 0: r is f, but rounded.
  const double s = e_sum == 0 ? 1 : e_sum + exp(f - r);
  const double t = gap > 0 ? -1 / (1 + exp(-gap)) : -exp(gap) / (1 + exp(gap));
  if (!(q.epsilon > 0)) {
    const double g = q.w_y * t;
    return {q.w_y * softplus, q.w_y / s, g * m.beta, g * m.gamma, g * m.alpha, -e_sum * m.alpha};
  }
  const double share = q.epsilon / q.c;
  const double total = (1 - q.epsilon) * q.w_y + share * q.w_sum;
  const double uniform = q.w_sum * (m.f + softplus) - sums.z_sum - q.w_y * m.f;
  const double loss = (1 - q.epsilon) * (q.w_y * softplus) + share * uniform;
  const double g = total * t + share * (q.w_sum - q.w_y);
  const double target_share = g * m.alpha + share * q.w_y;
  const double e_y = target_share * s / (total == 0 ? 1 : total);
  return {loss, total / s, g * m.beta, g * m.gamma, target_share, e_y};
}

// What backward gets of row i, in rows (5, N).
template <typename A>
__device__ void save_row(A* rows, int64_t n, int64_t i, const RowTerms& terms, double reference) {
  const double values[] = {terms.scale, terms.input_share, terms.weight_share, terms.target_share,
                           reference};
  for (int k = 0; k < 5; ++k) rows[k * n + i] = static_cast<A>(values[k]);
}

// One more row of E, by the whole block: label smoothing's constant gradient has rank one, and as a
// row of E its class side costs no pass of its own. Zeros from `width` to `end`.
template <typename T>
__device__ void write_class_weights(typename Storage<T>::E* e,
                                    const typename Storage<T>::Acc* class_weight, int64_t width,
                                    int64_t end) {
  using A = typename Storage<T>::Acc;
  for (int64_t j = threadIdx.x; j < end; j += blockDim.x) {
    e[j] = as_exponential<T>(j >= width ? A(0) : class_weight == nullptr ? A(1) : class_weight[j]);
  }
}

}  // namespace lsoftmax
