// What execute.py passes in and reads back; the same structures stand there, in the same order.
#pragma once
#include "metal_emu/context.h"
#include "platform.h"

struct Buffer {
  void* data;
  u64 bytes;
  u64 offset;     // bytes by which the copy is moved off its alignment
  u64 unwritten;  // out: bytes of an output that no thread wrote
  i32 is_output, is_initialised;
};

struct Variable {  // one threadgroup array or variable
  u64 address, bytes;
};

enum Kind : i32 {
  OUT_OF_BOUNDS = 1,
  RACE,
  UNINITIALISED,
  SIMD_DIVERGENCE,
  MISALIGNED,
  WRITE_TO_INPUT,
  SIMD_SHUFFLE,
  BARRIER,
  UNDEFINED_BEHAVIOUR,
};

enum { THREADGROUP_VARIABLE = 1000 };  // Report::buffer counts threadgroup variables from here

struct Report {
  i32 kind;
  u32 thread, other, threadgroup;
  u64 pc, other_pc;  // from the kernel's base; 0 if unknown
  i64 offset;
  i32 buffer, line, column, other_line, other_column, pad;
  char text[160];
};

enum Order : i32 { FORWARD, REVERSE, RANDOM };

struct Run {
  void (*entry)(void** buffers, const EmuContext* context);
  u64 image_lo, image_hi;              // where the kernel's shared object lies
  u64 threadgroup_lo, threadgroup_hi;  // its threadgroup variables and their red zones
  Buffer* buffers;
  Variable* variables;
  Report* reports;
  i32 n_buffers, n_variables, max_reports, n_reports;
  u32 grid[3], threadgroup[3];
  i32 checked, strict, order;
  u32 seed;
  i32 flush_denormals, pad;
  u64 switches, collectives, barriers, accesses;  // out: counts
};
