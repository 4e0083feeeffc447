#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext makes a system call each time, to keep a signal mask that nobody changes: a
// microsecond, against the ten nanoseconds of exchanging what a function call must preserve.
#if defined(__x86_64__)
asm(R"(
  .text
  .globl emulation_switch_context
  .hidden emulation_switch_context
  .type emulation_switch_context, @function
emulation_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulation_switch_context, . - emulation_switch_context
)");
extern "C" void emulation_switch_context(void** from, void** to);
#endif

namespace emulation {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // redzones make frames several times as large
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 64 * 1024;  // a multiple of every page size in use

Fiber* running = nullptr;

#if defined(__x86_64__)
using Context = void*;
void switch_context(Context* from, Context* to) { emulation_switch_context(from, to); }
#else
using Context = ucontext_t;
void switch_context(Context* from, Context* to) { swapcontext(from, to); }
#endif

Context scheduler;
[[maybe_unused]] void* scheduler_sanitizer_stack = nullptr;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_stack_bytes = 0;

// AddressSanitizer must be told of a change of stack before and after, or it takes frames for
// overflows.
void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}
void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** old_stack,
                  [[maybe_unused]] size_t* old_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, old_stack, old_bytes);
#endif
}

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);  // stacks grow down: an overflow ends here
  stack_ = static_cast<unsigned char*>(memory) + kGuardBytes;
  restart();
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

void Fiber::restart() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  at_rest_ = true;
  sanitizer_stack_ = nullptr;
#if defined(__x86_64__)
  // As if main() had been called from address 0 and had just been switched away from: six
  // registers, where to go on, and a return address that keeps the stack aligned as the ABI wants
  // it on entry.
  auto top = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uintptr_t>(&Fiber::main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::main, 0);
#endif
}

void Fiber::resume() {
  running = this;
  at_rest_ = false;
  before_switch(&scheduler_sanitizer_stack, stack_, kStackBytes);
  switch_context(&scheduler, &context_);
  after_switch(scheduler_sanitizer_stack, nullptr, nullptr);
  running = nullptr;
}

void Fiber::suspend() {
  Fiber* self = running;
  before_switch(&self->sanitizer_stack_, scheduler_stack, scheduler_stack_bytes);
  switch_context(&self->context_, &scheduler);
  after_switch(self->sanitizer_stack_, &scheduler_stack, &scheduler_stack_bytes);
}

void Fiber::main() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    running->body_();
    running->at_rest_ = true;
    suspend();
  }
}

}  // namespace emulation
