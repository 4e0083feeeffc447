// Launchers for ctypes: what went wrong, in words; empty where nothing did.
#pragma once

#include <cuda_runtime.h>

#include <exception>
#include <string>

template <typename Params>
const char* run_launcher(cudaError_t (*launch)(const Params&, cudaStream_t), const void* params) {
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
