// The launchers of csrc/hopper.h for ctypes: what went wrong, in words; empty where nothing did.
#include <exception>
#include <string>

#include "hopper.h"

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

extern "C" const char* hopper_row_reference(const void* params) {
  return run(lsoftmax::launch_row_reference, params);
}
extern "C" const char* hopper_gemm_exponentials(const void* params) {
  return run(lsoftmax::launch_gemm_exponentials, params);
}
extern "C" const char* hopper_exponential_rows(const void* params) {
  return run(lsoftmax::launch_exponential_rows, params);
}
