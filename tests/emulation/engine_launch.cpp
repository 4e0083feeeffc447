// Some launchers of csrc/lsoftmax.h for ctypes, in float: what went wrong, in words; empty where
// nothing did. For tests of strides that no tensor of a test can have.
#include <exception>
#include <string>

#include "lsoftmax.h"

namespace {

template <typename Params>
const char* run(cudaError_t (*launch)(const Params&, cudaStream_t), const void* params) {
  static std::string message;
  message.clear();
  try {
    const cudaError_t error = launch(*static_cast<const Params*>(params), nullptr);
    if (error != cudaSuccess) message = "error " + std::to_string(error);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" const char* engine_loss_rows(const void* params) {
  return run(lsoftmax::launch_loss_rows<float>, params);
}
extern "C" const char* engine_exponentials(const void* params) {
  return run(lsoftmax::launch_exponentials<float>, params);
}
extern "C" const char* engine_finish_gradients(const void* params) {
  return run(lsoftmax::launch_finish_gradients<float, false>, params);
}
extern "C" const char* engine_margin_logits(const void* params) {
  return run(lsoftmax::launch_margin_logits<float>, params);
}
extern "C" const char* engine_margin_logits_backward(const void* params) {
  return run(lsoftmax::launch_margin_logits_backward<float>, params);
}
