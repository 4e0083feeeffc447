// Before and after gemm_exponentials: the references of the rows, and their losses.
//
// exponential_rows finds the rows whose reference was too far off: their exponentials have
// overflowed, or are so large that backward's products might. Such a row is done anew by the block
// that finds it, its logits computed twice from x and w, once for their maximum and once for E.
// That reads w twice a row, and is for rows that hardly occur in a training that goes well: a logit
// 80 above the target's and a few hundred others'. The host need not know, so nothing waits for the
// device.

#include <c10/macros/Macros.h>

#include "block.cuh"
#include "hopper.h"
#include "row_terms.cuh"

namespace lsoftmax {
namespace {

// A reference lies so far above the logits it was found among, since others may be larger. Down to
// 62 below the largest of a row exponentials are numbers yet.
constexpr double kHeadroom = 25;
constexpr int kRowThreads = 256;
constexpr int kPack = 8;  // elements of x and w in 16 bytes

using c10::BFloat16;

struct Larger {
  __device__ float operator()(float p, float q) const { return p > q ? p : q; }
};
struct Add {
  __device__ double operator()(double p, double q) const { return p + q; }
};

__global__ void __launch_bounds__(kMaxThreads) row_reference_kernel(RowReference p) {
  const int64_t i = blockIdx.x, y = p.target[i];
  if (y == p.ignore_index) {  // its numbers are used for nothing
    if (threadIdx.x == 0) {
      p.reference[i] = 0;
      if (p.row_cosine != nullptr) p.row_cosine[i] = 0;
      for (int64_t k = 0; k < 4; ++k) p.margin_terms[k * p.n + i] = 0;
    }
    return;
  }
  CUDA_KERNEL_ASSERT(y >= 0 && y < p.c);
  float peak = -INFINITY;
  for (int64_t j = threadIdx.x; j < p.p; j += blockDim.x) {
    if (j != y) peak = Larger{}(p.pilot[i * p.p + j], peak);
  }
  peak = block_reduce(peak, Larger{});
  const Products sum = block_reduce(products(p.x + i * p.d, p.w + y * p.d, p.d), AddProducts{});
  if (threadIdx.x != 0) return;
  const MarginTerms m =
      margin_terms(sum.dot, sum.xx, sum.ww, p.margin, static_cast<double>(*p.lam));
  const double largest = static_cast<double>(peak);
  p.reference[i] = static_cast<float>((largest > m.f ? largest : m.f) + kHeadroom);
  if (p.row_cosine != nullptr) p.row_cosine[i] = static_cast<float>(cosine(sum));
  p.margin_terms[i] = m.f;
  p.margin_terms[p.n + i] = m.alpha;
  p.margin_terms[2 * p.n + i] = m.beta;
  p.margin_terms[3 * p.n + i] = m.gamma;
}

// x_i . w_j by one warp, the same bits in every lane and each time.
__device__ float logit(const BFloat16* x, const BFloat16* w, int64_t d) {
  float sum = 0;
  for (int64_t k = threadIdx.x % kWarp * kPack; k < d; k += kWarp * kPack) {
    const auto xs = load_pack<kPack>(x + k), ws = load_pack<kPack>(w + k);
#pragma unroll
    for (int v = 0; v < kPack; ++v) {
      sum += static_cast<float>(xs.values[v]) * static_cast<float>(ws.values[v]);
    }
  }
#pragma unroll
  for (int lane_mask = kWarp / 2; lane_mask > 0; lane_mask /= 2) sum += shuffle_xor(sum, lane_mask);
  return sum;
}

// A row anew, by the whole block: its reference, its E, and the sum of it.
__device__ double redo_row(const ExponentialRows& p, int64_t i, double f) {
  const BFloat16* x = p.x + i * p.d;
  const int64_t y = p.target[i];
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t first = threadIdx.x / kWarp;
  float peak = -INFINITY;
  for (int64_t j = first; j < p.c; j += warps) {
    const float z = logit(x, p.w + j * p.d, p.d);
    if (j != y) peak = Larger{}(z, peak);
  }
  peak = block_reduce(peak, Larger{});
  const double largest = static_cast<double>(peak);
  const float reference = static_cast<float>(largest > f ? largest : f);
  double sum = 0;
  for (int64_t j = first; j < p.c; j += warps) {
    const float z = logit(x, p.w + j * p.d, p.d);
    const float e = j == y ? 0.0f : exponential(z - reference);
    if (lane != 0) continue;
    sum += static_cast<double>(e);
    if (p.e != nullptr) p.e[i * p.e_stride + j] = static_cast<BFloat16>(e);
  }
  if (threadIdx.x == 0) p.reference[i] = reference;
  return block_reduce(sum, Add{});
}

__global__ void __launch_bounds__(kMaxThreads) exponential_rows_kernel(ExponentialRows p) {
  const int64_t i = blockIdx.x, y = p.target[i];
  if (y == p.ignore_index) {
    if (threadIdx.x != 0) return;
    p.row_loss[i] = 0;
    for (int64_t k = 0; k < 5 && p.rows != nullptr; ++k) p.rows[k * p.n + i] = 0;
    return;
  }
  const MarginTerms m{p.margin_terms[i], p.margin_terms[p.n + i], p.margin_terms[2 * p.n + i],
                      p.margin_terms[3 * p.n + i]};
  double r = static_cast<double>(p.reference[i]), e_sum = 0;
  for (int64_t k = threadIdx.x; k < class_tiles(p.c); k += blockDim.x) {
    e_sum += static_cast<double>(p.partial[i * class_tiles(p.c) + k]);
  }
  e_sum = block_reduce(e_sum, Add{});
  double s = e_sum + exp(m.f - r);
  // Not where it is NaN, and stays so: one such class vector would have every row done again.
  if (s < ldexp(1.0, -kSafe) || s > ldexp(1.0, kSafe)) {
    e_sum = redo_row(p, i, m.f);
    __syncthreads();  // thread 0 has written the reference
    r = static_cast<double>(p.reference[i]);
    s = e_sum + exp(m.f - r);
  }
  if (threadIdx.x != 0) return;

  const double w_y = p.class_weight == nullptr ? 1 : static_cast<double>(p.class_weight[y]);
  const RowTerms terms = row_terms(m, {r, e_sum, 0}, {w_y, 0, 0, 1});
  p.row_loss[i] = static_cast<float>(terms.loss);
  if (p.rows != nullptr) save_row(p.rows, p.n, i, terms, r);
}

}  // namespace

cudaError_t launch_row_reference(const RowReference& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  const int64_t longer = params.d > params.p ? params.d : params.p;
  return launch(row_reference_kernel, params.n, threads_for(longer), stream, params);
}

cudaError_t launch_exponential_rows(const ExponentialRows& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  return launch(exponential_rows_kernel, params.n, kRowThreads, stream, params);
}

}  // namespace lsoftmax
