// What the host side of both ops shares: checks, device and stream, types, matrix products.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "lsoftmax.h"

namespace lsoftmax {

using at::Tensor;

#define CHECK_SHAPE(tensor, ...)                                                             \
  TORCH_CHECK((tensor).sizes() == at::IntArrayRef(__VA_ARGS__), #tensor ": expected shape ", \
              at::IntArrayRef(__VA_ARGS__), ", got ", (tensor).sizes())

#define CHECK_LIKE(tensor, other, type)                                                  \
  TORCH_CHECK((tensor).device() == (other).device() && (tensor).scalar_type() == (type), \
              #tensor ": expected ", (type), " on ", (other).device(), ", got ",         \
              (tensor).scalar_type(), " on ", (tensor).device())

inline at::ScalarType accumulate_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Storage<T>::E.
inline at::ScalarType e_type(const Tensor& input) {
  return input.scalar_type() == at::kBFloat16 ? at::kBFloat16 : accumulate_type(input);
}

// What every op sets up before it touches a tensor: types were chosen by the caller, so autocast
// must not choose again, and autograd has its formula one level up.
struct Scope {
  explicit Scope(const Tensor& input)
      : device(input.device()), no_autocast(c10::autocast_dispatch_keyset) {}
  c10::cuda::CUDAGuard device;
  c10::impl::ExcludeDispatchKeyGuard no_autocast;
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
};

inline void check_matrices(const Tensor& input, const Tensor& linear_weight, const Tensor& target) {
  TORCH_CHECK(input.dim() == 2, "input: expected shape (N, D), got ", input.sizes());
  TORCH_CHECK(linear_weight.dim() == 2 && linear_weight.size(0) > 0,
              "linear_weight: expected shape (C, D) with C >= 1, got ", linear_weight.sizes());
  CHECK_SHAPE(linear_weight, {linear_weight.size(0), input.size(1)});
  CHECK_SHAPE(target, {input.size(0)});
  CHECK_LIKE(linear_weight, input, input.scalar_type());
  CHECK_LIKE(target, input, at::kLong);
}

inline void check_margin(int64_t margin, const Tensor& lam, const Tensor& input) {
  TORCH_CHECK(margin >= 1 && margin <= INT32_MAX, "margin: expected >= 1, got ", margin);
  CHECK_SHAPE(lam, {});
  CHECK_LIKE(lam, input, at::kFloat);
}

// Calls f with a value of the input's type.
template <typename F>
void for_type(const Tensor& input, F f) {
  switch (input.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(c10::Half{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    default:
      TORCH_CHECK(false, "input: expected float32, float64, float16 or bfloat16, got ",
                  input.scalar_type());
  }
}

// out = a b, accumulated and left in the type of `out`, which may be wider than that of the
// factors: a logit rounded to 16 bits is lost.
inline void matmul(Tensor out, const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == out.scalar_type()) {
    at::mm_out(out, a, b);
  } else if (a.is_cuda()) {
    at::mm_out(out, a, b, out.scalar_type());
  } else {  // the CPU (the kernels' emulation) has no such product
    at::mm_out(out, a.to(out.scalar_type()), b.to(out.scalar_type()));
  }
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// dX and dW from the two products: see FinishGradients. `scale`, `rest`, `constant` may be
// undefined.
inline void finish_gradients(const Tensor& x, const Tensor& w, const Tensor& target,
                             const Tensor& scale, const Tensor& input_share,
                             const Tensor& weight_share, const Tensor& rest, const Tensor& constant,
                             const Tensor& product, const Tensor& dx, const Tensor& dw,
                             cudaStream_t stream) {
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Storage<T>::Acc;
    FinishGradients<T> params{};
    params.x = pointer<T>(x);
    params.w = pointer<T>(w);
    params.target = pointer<int64_t>(target);
    params.scale = pointer<A>(scale);
    params.input = pointer<A>(input_share);
    params.weight = pointer<A>(weight_share);
    params.rest = pointer<A>(rest);
    params.constant = pointer<A>(constant);
    params.product = pointer<A>(product);
    params.dx = dx.defined() ? dx.mutable_data_ptr<T>() : nullptr;
    params.dw = dw.defined() ? dw.mutable_data_ptr<typename Storage<T>::E>() : nullptr;
    params.n = x.size(0);
    params.d = x.size(1);
    params.c = w.size(0);
    C10_CUDA_CHECK(launch_finish_gradients(params, stream));
  });
}

}  // namespace lsoftmax
