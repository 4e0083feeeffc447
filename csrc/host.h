// What the host side of both ops shares: checks, device and stream, types, matrix products.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

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

inline void check_matrices(const Tensor& input, const Tensor& linear_weight, const Tensor& target) {
  TORCH_CHECK(input.dim() == 2, "input: expected shape (N, D), got ", input.sizes());
  TORCH_CHECK(linear_weight.dim() == 2 && linear_weight.size(0) > 0,
              "linear_weight: expected shape (C, D) with C >= 1, got ", linear_weight.sizes());
  for_type(input, [](auto) {});  // before a library finds words of its own
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

// out = a b, or out += a b, accumulated and left in the type of `out`, which may be wider than that
// of the factors: a logit rounded to 16 bits is lost, and so is a gradient summed over chunks.
//
// cuBLAS adds to a float32 matrix from 16-bit factors; of torch's ways to it, addmm with out_dtype
// wants its summand in 16 bits up to torch 2.9, and baddbmm of one matrix never did. Where out is
// the summand, every version adds in place. The CPU (the kernels' emulation) has no such products,
// and torch refuses them where a user lets cuBLAS add in float16: these get wider factors.
inline void matmul(Tensor out, const Tensor& a, const Tensor& b, bool add = false) {
  const auto type = out.scalar_type();
  const bool mixed = a.is_cuda() && !(a.scalar_type() == at::kHalf &&
                                      at::globalContext().allowFP16AccumulationCuBLAS());
  if (a.scalar_type() != type && !mixed) {
    matmul(std::move(out), a.to(type), b.to(type), add);
  } else if (a.scalar_type() == type) {
    add ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
  } else if (add) {
    Tensor batch = out.unsqueeze(0);
    at::baddbmm_out(batch, batch, a.unsqueeze(0), b.unsqueeze(0), type);
  } else {
    at::mm_out(out, a, b, type);
  }
}

// The same where neither factor has more digits than TF32, whatever float32 can hold: tf32.cpp.
void matmul_tf32(const Tensor& out, const Tensor& a, const Tensor& b, bool add);

// An array whose size `memory_budget` bounds; where it does not fit, the error says what to do.
inline Tensor allocate(const char* what, at::IntArrayRef sizes, at::TensorOptions options) {
  try {
    return at::empty(sizes, options);
  } catch (const c10::Error& error) {
    // A fault of an earlier kernel may come to light here, too.
    const char* const words = error.what_without_backtrace();
    if (dynamic_cast<const c10::OutOfMemoryError*>(&error) == nullptr &&
        std::strstr(words, "can't allocate memory") == nullptr) {
      throw;
    }
    const double bytes = static_cast<double>(c10::multiply_integers(sizes)) *
                         static_cast<double>(options.dtype().itemsize());
    const auto budget = static_cast<int64_t>(std::max(1.0, bytes / 4));
    TORCH_CHECK_WITH(OutOfMemoryError, false, "lsoftmax: no memory for ", what, ": ",
                     static_cast<int64_t>(bytes), " bytes, shape ", sizes, ", ", options.dtype(),
                     ". Try memory_budget=", budget,
                     " or less, to compute the loss in smaller chunks. (", words, ")");
  }
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

template <typename T>
T* mutable_pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// Above so many rows comparing all pairs, in a kernel that runs anyway, takes longer than a sort.
constexpr int64_t kComparedRows = 4096;

// The rows sorted by target: done, or (true) for a kernel to fill in.
inline std::pair<Tensor, bool> order_of(const Tensor& target) {
  const int64_t n = target.size(0);
  if (n <= kComparedRows) return {at::empty({n}, target.options()), true};
  return {at::argsort(target, /*stable=*/true, /*dim=*/0, /*descending=*/false), false};
}

// What the rows' gradients are made of, but for the products: see FinishGradients.
struct Shares {
  const Tensor& order;
  Tensor scale, input, weight, rest, constant;  // (N,); scale, rest and constant may be undefined
};

// dX from `product`, and what is missing of the rows of dW that dw holds, classes first_class on.
// Either may be undefined: not needed.
inline void finish_gradients(const Tensor& x, const Tensor& w, const Tensor& target,
                             const Shares& shares, const Tensor& product, const Tensor& dx,
                             const Tensor& dw, int64_t first_class, bool wide,
                             cudaStream_t stream) {
  if (!dx.defined() && !dw.defined()) return;
  const auto finish = [&](auto zero, auto is_wide) {
    using T = decltype(zero);
    using Params = FinishGradients<T, decltype(is_wide)::value>;
    using A = typename Params::Acc;
    Params params{};
    params.x = pointer<T>(x);
    params.w = pointer<T>(w);
    params.target = pointer<int64_t>(target);
    params.order = pointer<int64_t>(shares.order);
    params.scale = pointer<A>(shares.scale);
    params.input = pointer<A>(shares.input);
    params.weight = pointer<A>(shares.weight);
    params.rest = pointer<A>(shares.rest);
    params.constant = pointer<A>(shares.constant);
    params.product = pointer<A>(product);
    params.dx = mutable_pointer<typename Params::DX>(dx);
    params.dw = mutable_pointer<typename Params::DW>(dw);
    params.n = x.size(0);
    params.d = x.size(1);
    params.first_class = first_class;
    params.width = dw.defined() ? dw.size(0) : 0;
    C10_CUDA_CHECK(launch_finish_gradients(params, stream));
  };
  for_type(x, [&](auto zero) {
    wide ? finish(zero, std::true_type{}) : finish(zero, std::false_type{});
  });
}

}  // namespace lsoftmax
