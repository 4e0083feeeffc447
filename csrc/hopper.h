// Launchers of the forward pass in one kernel, for bfloat16 on Hopper (compute capability 9.0):
// every pointer with its shape, as in lsoftmax.h.
//
// Three launches replace the matrix product and the row pass:
//   row_reference      the margin of each row, and a reference its exponentials are taken against
//   gemm_exponentials  E and its row sums, out of the accumulators of the product
//   exponential_rows   the loss and backward's row statistics; does rows anew whose reference was
//                      too far from their largest logit
// Label smoothing needs sums of the logits themselves: there the product and the row pass serve.
#pragma once

#include <c10/macros/Macros.h>

#include "lsoftmax.h"

namespace lsoftmax {

constexpr float kLog2E = 1.44269504088896340736f;
// Sums of exponentials between 2^-kSafe and 2^kSafe are used as they are: x / S, E and the products
// of both stay in the range of bfloat16 and float.
constexpr int kSafe = 80;
constexpr int kTileRows = 128, kTileClasses = 256;  // of E, that a block computes at a time

// Columns of GemmExponentials::partial.
C10_HOST_DEVICE constexpr int64_t class_tiles(int64_t c) {
  return (c + kTileClasses - 1) / kTileClasses;
}

// The tiles of an (n, c) E.
constexpr int64_t tiles(int64_t n, int64_t c) {
  return (n + kTileRows - 1) / kTileRows * class_tiles(c);
}

struct RowReference {
  const c10::BFloat16* x;  // (N, D)
  const c10::BFloat16* w;  // (C, D)
  const int64_t* target;   // (N,)
  const float* lam;        // ()
  const float* pilot;      // (N, P): logits of the first P classes, 0 <= P <= C
  float* reference;        // (N,)
  double* margin_terms;    // (4, N): f, alpha, beta, gamma
  float* row_cosine;       // (N,), as of LossRows; or null
  int64_t n, d, c, p;
  int64_t ignore_index;
  int margin;
};

// 25 above the larger of f and the pilot logits, the target's not counted. What a row's other
// logits may exceed it by is exponential_rows' business; with a few hundred classes they hardly do.
cudaError_t launch_row_reference(const RowReference& params, cudaStream_t stream);

struct GemmExponentials {
  const c10::BFloat16* x;  // (N, D)
  const c10::BFloat16* w;  // (C, D)
  const int64_t* target;   // (N,)
  const float* reference;  // (N,)
  c10::BFloat16* e;        // (N, e_stride), C rounded up to 8 used; or null: only the sums
  float* partial;          // (N, class_tiles(C)): sums of E over each tile of classes; or null
  int64_t n, d, c, e_stride;
  int64_t ignore_index;
  int64_t first_class;  // that w begins with: targets count from here; 0 unless w is a slice
};

// Whether launch_gemm_exponentials can serve these params on the current device: compute capability
// 9.0 and kernels built for 9.0a; D and e_stride multiples of 8, x, w and e aligned to 16 bytes
// (the rules of bulk copies and of 16-byte stores); N and C below 2^31.
bool gemm_exponentials_supported(const GemmExponentials& params);

// E_ij = exp(x_i . w_j - r_i) for j other than the target; 0 in the target's column, in ignored
// rows, and up to the next multiple of 8. Without sums, which would show it, never above 2^kSafe.
// cudaErrorNotSupported where the above says no.
cudaError_t launch_gemm_exponentials(const GemmExponentials& params, cudaStream_t stream);

struct ExponentialRows {
  const c10::BFloat16* x;      // (N, D)
  const c10::BFloat16* w;      // (C, D)
  const int64_t* target;       // (N,)
  const float* class_weight;   // (C,), or null: all 1
  const double* margin_terms;  // (4, N), of row_reference
  const float* partial;        // (N, class_tiles(C))
  float* reference;            // (N,): replaced where the row is done anew
  c10::BFloat16* e;            // (N, e_stride), likewise; or null
  float* row_loss;             // (N,)
  float* rows;                 // (5, N), as of LossRows; or null
  int64_t n, d, c, e_stride;
  int64_t ignore_index;
};

// D must be a multiple of 8, x and w aligned to 16 bytes.
cudaError_t launch_exponential_rows(const ExponentialRows& params, cudaStream_t stream);

}  // namespace lsoftmax
