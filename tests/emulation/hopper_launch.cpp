// The launchers of csrc/hopper.h for ctypes: what went wrong, in words; empty where nothing did.
#include "hopper.h"

#include "launch.h"

extern "C" const char* hopper_row_reference(const void* params) {
  return run_launcher(lsoftmax::launch_row_reference, params);
}
extern "C" const char* hopper_gemm_exponentials(const void* params) {
  return run_launcher(lsoftmax::launch_gemm_exponentials, params);
}
extern "C" const char* hopper_exponential_rows(const void* params) {
  return run_launcher(lsoftmax::launch_exponential_rows, params);
}
