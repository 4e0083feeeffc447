// Some launchers of csrc/lsoftmax.h for ctypes, in float: what went wrong, in words; empty where
// nothing did. For tests of strides that no tensor of a test can have.
#include "lsoftmax.h"

#include "launch.h"

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
