// What the emulator's own tests share: each case is a function that launches, and throws if all was
// not well. tests/test_emulation.py runs them by name.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <string>

using Cases = std::map<std::string, void (*)()>;

extern const Cases kRightCases, kFaultyCases;

template <typename... Params, typename... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Params...), Args... args) {
  const cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr, nullptr, 0};
  cudaLaunchKernelEx(&config, kernel, args...);  // FAULT: launch
}
