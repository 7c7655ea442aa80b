// Fibers, the threads of an emulated block: stacks, and the switch from one to another.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fm::emulation {

inline constexpr unsigned kMaxThreads = 1024;
inline constexpr size_t kStackBytes = 128 * 1024, kPageBytes = 4096;

// One stack for each thread, above a guard page; memory is allocated on first use.
struct Stacks {
  static constexpr size_t kBytes = kMaxThreads * (kStackBytes + kPageBytes);
  char* memory;
  Stacks() {
    void* all = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(all);
    for (unsigned t = 0; t < kMaxThreads; ++t) mprotect(of(t) - kPageBytes, kPageBytes, PROT_NONE);
  }
  ~Stacks() { munmap(memory, kBytes); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  char* of(unsigned thread) const { return memory + thread * (kStackBytes + kPageBytes) + kPageBytes; }
};

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; callee-saved registers lie on the stack

extern "C" __attribute__((visibility("hidden"))) void fm_emulation_switch(Context* from, Context to);
asm(R"(
.text
.hidden fm_emulation_switch
.globl fm_emulation_switch
.type fm_emulation_switch, @function
fm_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fm_emulation_switch, .-fm_emulation_switch
)");

inline void switch_context(Context& from, Context& to) { fm_emulation_switch(&from, to); }

inline void make_context(Context& context, char* stack, void (*run)(), Context&) {
  auto top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;                       // the return address of `run`, which never returns
  top[-2] = reinterpret_cast<void*>(run);  // the first switch returns here, with the stack as after a call
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context = top - 8;
}
#else
using Context = ucontext_t;  // slower: a system call saves the signal mask
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, char* stack, void (*run)(), Context& scheduler) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = &scheduler;
  makecontext(&context, run, 0);
}
#endif

}  // namespace fm::emulation
