// How a fault in a kernel is told: what, where in the source, and which block and thread met it.
#pragma once

#include <string>

namespace emulation {

struct Site {
  const char* file = nullptr;
  int line = 0;
};

std::string to_string(Site site);

// Throws std::runtime_error (Python sees RuntimeError) in the name of the running thread.
[[noreturn]] void fault(const std::string& what, Site site);

}  // namespace emulation

// c10's version aborts the process, which is right on a device and useless to a test.
#include <c10/macros/Macros.h>
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(cond)                                                        \
  do {                                                                                  \
    if (!(cond)) {                                                                      \
      ::emulation::fault("device-side assertion failed: " #cond, {__FILE__, __LINE__}); \
    }                                                                                   \
  } while (0)
