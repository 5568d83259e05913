// Switching between stacks: a dozen instructions on x86-64 and aarch64, ucontext (a system call each) elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) || defined(__aarch64__)

extern "C" void shim_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.hidden shim_switch
.weak shim_switch
.type shim_switch, @function
shim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size shim_switch, .-shim_switch
)");
constexpr int kReturnWord = 6, kFrameWords = 8;  // one word more than saved, to align the stack
#else
asm(R"(
.text
.p2align 4
.hidden shim_switch
.weak shim_switch
.type shim_switch, %function
shim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size shim_switch, .-shim_switch
)");
constexpr int kReturnWord = 11, kFrameWords = 20;
#endif

namespace shim {

struct Context {
  void* stack_pointer = nullptr;
};
inline void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
  auto* words = reinterpret_cast<uintptr_t*>(stack + bytes) - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) words[i] = 0;
  words[kReturnWord] = reinterpret_cast<uintptr_t>(entry);
  context.stack_pointer = words;
}
inline void switch_to(Context& from, Context& to) { shim_switch(&from.stack_pointer, to.stack_pointer); }

}  // namespace shim

#else

#include <ucontext.h>

namespace shim {

struct Context {
  ucontext_t context;
};
inline void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

}  // namespace shim

#endif
