// What the compiler calls in a checked build: before each access (-fsanitize=thread) and at undefined behaviour.
#pragma once
#include "memory.h"

#define PC __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define ACCESS(prefix, bytes, aligned)                                                       \
  void __tsan_##prefix##read##bytes(void* p) { check_access(p, bytes, false, aligned, PC); } \
  void __tsan_##prefix##write##bytes(void* p) { check_access(p, bytes, true, aligned, PC); } \
  void __tsan_##prefix##read_write##bytes(void* p) {                                         \
    check_access(p, bytes, false, aligned, PC);                                              \
    check_access(p, bytes, true, aligned, PC);                                               \
  }
ACCESS(, 1, true)
ACCESS(, 2, true)
ACCESS(, 4, true)
ACCESS(, 8, true)
ACCESS(, 16, true)
ACCESS(unaligned_, 2, false)
ACCESS(unaligned_, 4, false)
ACCESS(unaligned_, 8, false)
ACCESS(unaligned_, 16, false)

static void check_range(const void* p, size_t bytes, bool writes, const void* pc) {
  if (bytes) check_access(const_cast<void*>(p), (unsigned)bytes, writes, false, pc);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  check_range(from, bytes, false, PC);
  check_range(to, bytes, true, PC);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  check_range(from, bytes, false, PC);
  check_range(to, bytes, true, PC);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  check_range(to, bytes, true, PC);
  return memset(to, value, bytes);
}

// Every handler's first argument starts with the place in the text.
struct SourceLocation {
  const char* file;
  u32 line, column;
};

static void report_undefined(const SourceLocation* at, const char* what) {
  if (!run) return;
  int line = (int)at->line | file_mark(at->file);
  for (int i = 0; i < run->n_reports; i++) {
    const Report& r = run->reports[i];
    if (r.kind == UNDEFINED_BEHAVIOUR && r.line == line && r.column == (int)at->column) return;
  }
  Report* r = report(UNDEFINED_BEHAVIOUR);
  r->line = line;
  r->column = (int)at->column;
  snprintf(r->text, sizeof r->text, "%s", what);
}

#define UNDEFINED(name, what)                                                    \
  void __ubsan_handle_##name(SourceLocation* at) { report_undefined(at, what); } \
  void __ubsan_handle_##name##_abort(SourceLocation* at) {                       \
    report_undefined(at, what);                                                  \
    abort_run();                                                                 \
  }
UNDEFINED(add_overflow, "signed integer overflow in +")
UNDEFINED(sub_overflow, "signed integer overflow in -")
UNDEFINED(mul_overflow, "signed integer overflow in *")
UNDEFINED(negate_overflow, "signed integer overflow in unary -")
UNDEFINED(divrem_overflow, "division by zero, or its result overflows")
UNDEFINED(shift_out_of_bounds, "shift by more bits than there are, or of a negative value")
UNDEFINED(float_cast_overflow, "float value does not fit the integer type")

// After these there is no value to go on with.
#define FATAL(name, what)                          \
  void __ubsan_handle_##name(SourceLocation* at) { \
    report_undefined(at, what);                    \
    abort_run();                                   \
  }                                                \
  void __ubsan_handle_##name##_abort(SourceLocation* at) { __ubsan_handle_##name(at); }
FATAL(builtin_unreachable, "unreachable code reached")
FATAL(missing_return, "function ends without returning a value")
FATAL(out_of_bounds, "array index out of bounds")

// Conversion to bfloat16, which older compiler support libraries lack: round to nearest even, keep NaN a NaN.
__bf16 __truncsfbf2(float value) {
  u32 bits = __builtin_bit_cast(u32, value);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  u16 top = (u16)(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return __builtin_bit_cast(__bf16, top);
}
__bf16 __truncdfbf2(double value) { return __truncsfbf2((float)value); }
}
#undef PC
