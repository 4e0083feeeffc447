// The margin of one row: psi, its derivative, the target logit and the coefficients of its
// gradient.
//
// Everything here is double, whatever the inputs: psi magnifies an error of the cosine by up to
// m^2, products of two floats are exact in double, and |x|^2 of a tiny or huge row stays in range.
// It is O(N D) work beside the O(N C D) of the logits.
#pragma once

#include <math.h>

#include "block.cuh"

namespace lsoftmax {

struct Psi {
  double value;       // (-1)^k T_m(c) - 2k
  double derivative;  // (-1)^k m U_{m-1}(c)
};

// T and U by the three-term recurrence: the expanded monomials cancel, and c may leave [-1, 1] by
// rounding without harm. The bucket k is the number of edges cos(j pi / m) above c; these are the
// zeros of U_{m-1}, and above c there are as many as U_0(c), ..., U_{m-1}(c) change signs (Sturm).
// So no cosine is taken, and where rounding decides the last sign, k goes with the sign of U.
__host__ __device__ inline Psi psi(double c, int margin) {
  double u_prev = 0, u = 1;
  int k = 0;
  for (int n = 1; n < margin; ++n) {
    const double next = 2 * c * u - u_prev;
    k += (next < 0) != (u < 0);
    u_prev = u;
    u = next;
  }
  const double t = c * u - u_prev, sign = k % 2 == 0 ? 1 : -1;
  return {sign * t - 2 * k, sign * margin * u};
}

// f replaces the target's logit; df/dx = alpha w_y + beta x, df/dw_y = alpha x + gamma w_y.
struct MarginTerms {
  double f, alpha, beta, gamma;
};

// From x . w_y, |x|^2 and |w_y|^2. A zero row has no angle: the plain logit, whose gradient lets it
// leave zero.
__host__ __device__ inline MarginTerms margin_terms(double dot, double xx, double ww, int margin,
                                                    double lam) {
  if (!(xx != 0 && ww != 0)) return {0, 1, 0, 0};
  const double a = sqrt(xx), b = sqrt(ww);
  const double s = a * b, c = dot / s;
  const Psi p = psi(c, margin);
  const double q = (p.value - c * p.derivative) / (1 + lam);
  return {(lam * dot + s * p.value) / (1 + lam), (lam + p.derivative) / (1 + lam), q * b / a,
          q * a / b};
}

struct Products {
  double dot, xx, ww;
};

// 0 where a zero row leaves no angle.
__host__ __device__ inline double cosine(const Products& p) {
  return p.xx != 0 && p.ww != 0 ? p.dot / (sqrt(p.xx) * sqrt(p.ww)) : 0;
}

struct AddProducts {
  __device__ Products operator()(const Products& p, const Products& q) const {
    return {p.dot + q.dot, p.xx + q.xx, p.ww + q.ww};
  }
};

// This thread's share of x . w, |x|^2, |w|^2 over rows of d elements.
template <typename T>
__device__ Products products(const T* x, const T* w, int64_t d) {
  constexpr int kVector = 16 / sizeof(T);
  Products sum{0, 0, 0};
  const auto add = [&sum](T x_value, T w_value) {
    const double xv = static_cast<double>(x_value), wv = static_cast<double>(w_value);
    sum.dot += xv * wv;
    sum.xx += xv * xv;
    sum.ww += wv * wv;
  };
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(w)) % 16 == 0;
  const int64_t packs = aligned ? d / kVector : 0;
  for (int64_t k = threadIdx.x; k < packs; k += blockDim.x) {
    const auto xs = load_pack<kVector>(x + k * kVector), ws = load_pack<kVector>(w + k * kVector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) add(xs.values[v], ws.values[v]);
  }
  for (int64_t j = packs * kVector + threadIdx.x; j < d; j += blockDim.x) add(x[j], w[j]);
  return sum;
}

}  // namespace lsoftmax
