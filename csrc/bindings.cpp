// The only file that knows Python: registers the kernels as the ops' CUDA implementation, and says
// what they were built with. The schemas are registered by lsoftmax/ops.py.

#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "engine.h"

#ifndef LSOFTMAX_DISPATCH_KEY  // the kernels' emulation registers for CPU tensors
#define LSOFTMAX_DISPATCH_KEY CUDA
#endif

TORCH_LIBRARY_IMPL(lsoftmax, LSOFTMAX_DISPATCH_KEY, m) {
  m.impl("loss_fwd", &lsoftmax::loss_fwd);
  m.impl("loss_bwd", &lsoftmax::loss_bwd);
  m.impl("loss_and_gradients", &lsoftmax::loss_and_gradients);
  m.impl("shard_fwd", &lsoftmax::shard_fwd);
  m.impl("shard_bwd", &lsoftmax::shard_bwd);
  m.impl("linear_fwd", &lsoftmax::linear_fwd);
  m.impl("linear_bwd", &lsoftmax::linear_bwd);
  m.impl("upcoming_lam", &lsoftmax::upcoming_lam);
  m.impl("anneal_", &lsoftmax::anneal_);
  m.impl("own_cosines", &lsoftmax::own_cosines);
  m.impl("count_classes_", &lsoftmax::count_classes_);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.attr("torch_version") = TORCH_VERSION; }
