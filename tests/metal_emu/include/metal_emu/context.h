// What a running kernel and the runtime say to each other.
#pragma once

struct EmuUint3 {
  unsigned x, y, z;
};

// The attributes of one thread; the entry that the Python side writes copies them into the kernel's parameters.
struct EmuContext {
  EmuUint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  EmuUint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threadgroups_per_grid, threads_per_grid;
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
};

// How a lane names the lane it reads from.
enum EmuShuffle { EMU_LANE, EMU_DOWN, EMU_UP, EMU_XOR, EMU_BROADCAST, EMU_ROTATE_DOWN, EMU_ROTATE_UP };

#ifndef __OPENCL_CPP_VERSION__  // the type check only needs declarations that kernels see
extern "C" {
// Both replace the `size` bytes at `value` by what the simdgroup agrees on; line and column name the call.
void emu_exchange(void* value, unsigned size, int lane, int shuffle, int line, int column, const char* file);
void emu_reduce(void* value, unsigned size, void (*combine)(const void*, void*, unsigned), int line, int column,
                const char* file);
void emu_threadgroup_barrier(int flags, int line, int column, const char* file);
void emu_simdgroup_barrier(int flags, int line, int column, const char* file);
unsigned emu_lane(void);
// Says which call of a library function the accesses that follow belong to.
void emu_place(int line, int column, const char* file);
// Called before an atomic operation; `reads` is 0 for a plain store.
void emu_atomic(const volatile void* address, unsigned size, int reads, int line, int column, const char* file);
}
#endif
