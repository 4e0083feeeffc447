// The forward pass in one kernel, for bfloat16 on Hopper: see hopper.h. The environment variable
// LSOFTMAX_FUSED_FORWARD overrules the choice by size: 0 is never, 1 wherever it can be.

#include <cstdlib>
#include <cstring>

#include "hopper.h"
#include "loss.h"

namespace lsoftmax {
namespace {

// Classes whose logits find each row's reference.
constexpr int64_t kPilotClasses = 256;

// Tiles that keep a device busy. On an H200 (benchmarks/results) 80 took as long as the product and
// the row pass, 3128 a quarter less; 4, each a long product by itself, three times as long.
constexpr int64_t kLeastTiles = 128;

bool wanted(const Loss& loss) {
  const char* value = std::getenv("LSOFTMAX_FUSED_FORWARD");
  if (value != nullptr && std::strcmp(value, "0") == 0) return false;
  if (value != nullptr && std::strcmp(value, "1") == 0) return true;
  return loss.c() > kPilotClasses && tiles(loss.n(), loss.c()) >= kLeastTiles;
}

GemmExponentials product_of(const Loss& loss, int64_t stride) {
  GemmExponentials params{};
  params.x = pointer<c10::BFloat16>(loss.x);
  params.w = pointer<c10::BFloat16>(loss.w);
  params.target = pointer<int64_t>(loss.y);
  params.n = loss.n();
  params.d = loss.d();
  params.c = loss.c();
  params.e_stride = stride;
  params.ignore_index = loss.ignore_index;
  return params;
}

}  // namespace

bool can_fuse_forward(const Loss& loss) {
  return !loss.shard && loss.x.scalar_type() == at::kBFloat16 && !loss.smooth() && loss.n() > 0 &&
         wanted(loss) && gemm_exponentials_supported(product_of(loss, padded(loss.c())));
}

int64_t fused_forward_columns(const Loss& loss) {
  return class_tiles(loss.c()) + std::min(loss.c(), kPilotClasses);
}

void fused_forward(const Loss& loss, const Margin& margin, const Tensor& e, const Rows& rows,
                   cudaStream_t stream) {
  const int64_t n = loss.n(), pilots = std::min(loss.c(), kPilotClasses);
  const Tensor pilot = at::empty({n, pilots}, loss.wide());
  matmul(pilot, loss.x, loss.w.narrow(0, 0, pilots).t());
  const Tensor reference = at::empty({n}, loss.wide());
  const Tensor terms = at::empty({4, n}, loss.wide().dtype(at::kDouble));
  const Tensor partial = at::empty({n, class_tiles(loss.c())}, loss.wide());

  GemmExponentials product = product_of(loss, padded(loss.c()));
  product.reference = pointer<float>(reference);
  product.e = mutable_pointer<c10::BFloat16>(e);
  product.partial = mutable_pointer<float>(partial);

  RowReference first{};
  first.x = product.x;
  first.w = product.w;
  first.target = product.target;
  first.lam = pointer<float>(margin.lam);
  first.pilot = pointer<float>(pilot);
  first.reference = mutable_pointer<float>(reference);
  first.margin_terms = mutable_pointer<double>(terms);
  first.row_cosine = mutable_pointer<float>(rows.cosine);
  first.n = n;
  first.d = product.d;
  first.c = product.c;
  first.p = pilots;
  first.ignore_index = product.ignore_index;
  first.margin = margin.value;

  ExponentialRows last{};
  last.x = product.x;
  last.w = product.w;
  last.target = product.target;
  last.class_weight = pointer<float>(loss.class_weight);
  last.margin_terms = first.margin_terms;
  last.partial = product.partial;
  last.reference = first.reference;
  last.e = product.e;
  last.row_loss = mutable_pointer<float>(rows.loss);
  last.rows = mutable_pointer<float>(rows.saved);
  last.n = n;
  last.d = product.d;
  last.c = product.c;
  last.e_stride = product.e_stride;
  last.ignore_index = product.ignore_index;

  C10_CUDA_CHECK(launch_row_reference(first, stream));
  C10_CUDA_CHECK(launch_gemm_exponentials(product, stream));
  C10_CUDA_CHECK(launch_exponential_rows(last, stream));
}

void fused_exponentials(const Loss& loss, const Tensor& reference, const Tensor& e,
                        int64_t first_class, int64_t width, cudaStream_t stream) {
  GemmExponentials product = product_of(loss, e.size(1));
  product.w += first_class * loss.d();
  product.c = width;
  product.first_class = first_class;
  product.reference = pointer<float>(reference);
  product.e = mutable_pointer<c10::BFloat16>(e);
  C10_CUDA_CHECK(launch_gemm_exponentials(product, stream));
}

}  // namespace lsoftmax
