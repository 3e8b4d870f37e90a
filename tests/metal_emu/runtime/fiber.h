// Every GPU thread is a fiber: a stack of its own and a switch that saves the callee's registers.
#pragma once
#include "abi.h"

extern "C" void emu_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
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
.size emu_switch,.-emu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,%function
emu_switch:
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
.size emu_switch,.-emu_switch
)");
#else
#error "The emulator switches stacks on x86-64 and aarch64; write emu_switch for this architecture."
#endif

static const int MAX_THREADS = 1024, LANES = 32, MAX_SIMDGROUPS = MAX_THREADS / LANES;
static const size_t STACK_BYTES = 128 * 1024, PAGE_BYTES = 4096;
static const unsigned SLOT_BYTES = 64;  // the largest value that lanes exchange

enum State : int { READY, AT_SIMD_OPERATION, AT_SIMDGROUP_BARRIER, AT_THREADGROUP_BARRIER, DONE };

// A place's line tells its file in its top bits: 0 the body, 1 the kernel's header, 2 a library header.
static int file_mark(const char* file) {
  while (file[1]) file++;
  return (*file == 'r') << 24 | (*file == 'h') << 25;
}

struct Fiber {
  void* stack_pointer;
  State state;
  int line, column;  // of the call it waits at
  u32 index, id;     // in its threadgroup; in the grid, threadgroup * MAX_THREADS + index
  // What it brought to that call: flags of a barrier, or lane, shuffle and value of a simd operation.
  int argument, shuffle;
  u32 size;
  void (*combine)(const void*, void*, unsigned);
  alignas(64) char value[SLOT_BYTES];
  EmuContext context;

  int simdgroup() const { return index / LANES; }
  int lane() const { return index % LANES; }
  bool waits_with(const Fiber& other) const {
    return state == other.state && line == other.line && column == other.column;
  }
};

struct Simdgroup {
  int size, live, waiting;  // lanes; not yet returned; at a simd operation or simdgroup barrier
  alignas(64) char in[LANES * SLOT_BYTES];
  alignas(64) char out[LANES * SLOT_BYTES];
};

static Run* run;
static void** kernel_arguments;
static Fiber* fibers;
static Simdgroup* simdgroups;
static char* stacks;
static Fiber* current;  // nullptr outside the kernel
static void* main_stack_pointer;
static bool aborting;
static u32 current_threadgroup;

// A new report about the current thread; past the last one, a scrap that nobody reads.
static Report* report(Kind kind) {
  static Report scrap;
  Report* r = run->n_reports < run->max_reports ? &run->reports[run->n_reports++] : &scrap;
  memset(r, 0, sizeof *r);
  r->kind = kind;
  r->buffer = -1;
  r->threadgroup = current_threadgroup;
  if (current) {
    r->thread = current->index;
    r->line = current->line;
    r->column = current->column;
  }
  return r;
}

extern "C" void emu_place(int line, int column, const char* file) {
  current->line = line | file_mark(file);
  current->column = column;
}

// The kernel cannot go on: back to emu_run.
[[noreturn]] static void abort_run() {
  aborting = true;
  void* never;
  emu_switch(&never, main_stack_pointer);
  __builtin_unreachable();
}

// One mapping for all: what lies in it is private to threads or to the runtime, and its accesses are not checked.
static const size_t STACKS_BYTES = STACK_BYTES * MAX_THREADS, FIBERS_BYTES = sizeof(Fiber) * MAX_THREADS;
static const size_t ARENA_BYTES = STACKS_BYTES + FIBERS_BYTES + sizeof(Simdgroup) * MAX_SIMDGROUPS;

static void allocate_fibers() {
  if (stacks) return;
  stacks = map_pages(ARENA_BYTES);
  // Below each stack, a page that stops what runs over.
  for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + STACK_BYTES * i, PAGE_BYTES, PROT_NONE);
  fibers = (Fiber*)(stacks + STACKS_BYTES);
  simdgroups = (Simdgroup*)(stacks + STACKS_BYTES + FIBERS_BYTES);
}

static bool is_private(uptr address) { return address - (uptr)stacks < ARENA_BYTES; }

// The fiber's first switch will start `main`.
static void prepare_stack(Fiber* fiber, void (*main)()) {
  uptr top = (uptr)(stacks + STACK_BYTES * (fiber->index + 1)) & ~(uptr)63;
#if defined(__x86_64__)
  void** sp = (void**)(top - 8);  // a function starts with its stack 8 off a multiple of 16
  *sp = nullptr;
  *--sp = (void*)main;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
#else
  void** sp = (void**)(top - 160);
  memset(sp, 0, 160);
  sp[11] = (void*)main;  // x30, where ret goes
#endif
  fiber->stack_pointer = sp;
}
