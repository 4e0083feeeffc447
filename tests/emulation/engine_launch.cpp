// For ctypes. Some launchers of csrc/lsoftmax.h in float, which return what went wrong, in words,
// empty where nothing did: for tests of strides that no tensor of a test can have. And a switch
// that leaves matrix products out, for the host's time.
#include "lsoftmax.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "launch.h"

namespace {

class Silent : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

at::Tensor& no_product(const at::Tensor&, const at::Tensor&, at::Tensor& out) { return out; }

at::Tensor& no_sum(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Scalar&,
                   const at::Scalar&, at::Tensor& out) {
  return out;
}

std::optional<torch::Library> no_products;  // while it lives, products return at once

}  // namespace

extern "C" void engine_set_products_stubbed(int value) {
  no_products.reset();
  if (value == 0) return;
  Silent silent;  // torch warns where a kernel takes the place of another, as is meant here
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  no_products.emplace(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  no_products->impl("mm.out", no_product);
  no_products->impl("addmm.out", no_sum);
}

extern "C" const char* engine_loss_rows(const void* params) {
  return run_launcher(lsoftmax::launch_loss_rows<float>, params);
}
extern "C" const char* engine_exponentials(const void* params) {
  return run_launcher(lsoftmax::launch_exponentials<float>, params);
}
extern "C" const char* engine_finish_gradients(const void* params) {
  return run_launcher(lsoftmax::launch_finish_gradients<float, false>, params);
}
extern "C" const char* engine_margin_logits(const void* params) {
  return run_launcher(lsoftmax::launch_margin_logits<float>, params);
}
extern "C" const char* engine_margin_logits_backward(const void* params) {
  return run_launcher(lsoftmax::launch_margin_logits_backward<float>, params);
}
