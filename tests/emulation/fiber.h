// A stack of its own for each thread of a block, and the switch between them.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

// Runs `body` once each time it is resumed from rest. A fiber that is never resumed again costs its
// stack and nothing else: what lay on it is not destroyed, which is as it should be for a thread of
// a kernel that failed.
class Fiber {
 public:
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  void operator=(const Fiber&) = delete;

  void resume();          // from the scheduler, until the fiber suspends or its body returns
  static void suspend();  // from within the running fiber
  void restart();         // forget what was under way; at rest again
  bool at_rest() const { return at_rest_; }

 private:
  static void main();

  void (*body_)();
  unsigned char* stack_ = nullptr;
  void* sanitizer_stack_ = nullptr;
  bool at_rest_ = true;
#if defined(__x86_64__)
  void* context_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emulation
