// Products of float32 matrices by tensor cores, which read 11 digits of each element: for matrices
// whose elements have no more. Torch would have it as a setting of the whole process only.

#include "host.h"

// The emulation has no cuBLAS, and a toolkit without its headers can build all but this.
#if !defined(LSOFTMAX_DISPATCH_KEY) && __has_include(<cublas_v2.h>) && \
    __has_include(<cublasLt.h>) && __has_include(<cusparse.h>) && __has_include(<cusolverDn.h>)
#define LSOFTMAX_CUBLAS
#include <ATen/cuda/CUDAContext.h>
#endif

namespace lsoftmax {

#ifdef LSOFTMAX_CUBLAS

namespace {

bool row_major(const Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1);
}

// Whether cuBLAS takes it as it lies in memory. (A single row or column may have any strides.)
bool fits(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const bool column_major = matrix.stride(0) == 1 && matrix.stride(1) >= rows;
  const int64_t largest = std::max({rows, columns, matrix.stride(0), matrix.stride(1)});
  return (row_major(matrix) || column_major) && rows > 0 && columns > 0 && largest <= INT32_MAX;
}

// To cuBLAS, whose matrices are column-major, a row-major one is its transpose.
struct Factor {
  const float* data;
  cublasOperation_t op;
  int stride;

  explicit Factor(const Tensor& matrix)
      : data(matrix.const_data_ptr<float>()),
        op(row_major(matrix) ? CUBLAS_OP_N : CUBLAS_OP_T),
        stride(static_cast<int>(matrix.stride(op == CUBLAS_OP_N ? 0 : 1))) {}
};

}  // namespace

void matmul_tf32(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (!fits(a) || !fits(b) || !fits(out) || !row_major(out)) return matmul(out, a, b, add);
  const Factor left(b), right(a);  // out' = b' a'
  const float one = 1, beta = add ? 1 : 0;
  const cublasStatus_t status = cublasGemmEx(
      at::cuda::getCurrentCUDABlasHandle(), left.op, right.op, static_cast<int>(out.size(1)),
      static_cast<int>(out.size(0)), static_cast<int>(a.size(1)), &one, left.data, CUDA_R_32F,
      left.stride, right.data, CUDA_R_32F, right.stride, &beta, out.mutable_data_ptr<float>(),
      CUDA_R_32F, static_cast<int>(out.stride(0)), CUBLAS_COMPUTE_32F_FAST_TF32,
      CUBLAS_GEMM_DEFAULT);
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "cublasGemmEx: ", cublasGetStatusString(status));
}

#else

void matmul_tf32(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  matmul(out, a, b, add);
}

#endif

}  // namespace lsoftmax
