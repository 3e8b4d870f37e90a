// Runs a compute kernel on one OS thread, one threadgroup after another, in the order asked for.
#include "lanes.h"
#include "memory.h"
#include "sanitizer.h"

static const size_t GUARD_BYTES = 4096;
static const int FILL = 0xCB;  // what memory holds that nobody has written

// ------------------------------------------------------------------------------------------------ crashes
static const int CRASHES[] = {SIGSEGV, SIGBUS, SIGFPE};
static SignalAction earlier_actions[3];

static void on_crash(int signal, SignalInfo* info, void*) {
  if (!run || !current) {
    SignalAction standard = {};
    sigaction(signal, &standard, nullptr);
    raise(signal);
    return;
  }
  Report* r = report(OUT_OF_BOUNDS);
  if (signal == SIGFPE)
    snprintf(r->text, sizeof r->text, "crash: integer division by zero or overflow");
  else if (is_private((uptr)info->address))
    snprintf(r->text, sizeof r->text, "crash: private variables of a thread take more than %d KB",
             (int)(STACK_BYTES >> 10));
  else
    snprintf(r->text, sizeof r->text, "crash: access to %p", info->address);
  abort_run();
}

static void catch_crashes() {
  static char* stack = map_pages(65536);  // the fiber's own may be what overflowed
  SignalStack alternate = {stack, 0, 65536};
  sigaltstack(&alternate, nullptr);
  SignalAction action = {};
  action.handler = on_crash;
  action.flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 3; i++) sigaction(CRASHES[i], &action, &earlier_actions[i]);
}

static void release_crashes() {
  for (int i = 0; i < 3; i++) sigaction(CRASHES[i], &earlier_actions[i], nullptr);
}

// ------------------------------------------------------------------------------------------------ buffers
// A private copy of each buffer between two guard gaps, and the cells that watch it.
struct Copy {
  char* pages;
  char* data;
  size_t mapped, cell_bytes;
  Cell* cells;
};

static Copy copy_in(const Buffer& buffer, int index) {
  Copy copy = {};
  copy.mapped = buffer.bytes + 2 * GUARD_BYTES + 256;
  copy.pages = map_pages(copy.mapped);
  copy.data = copy.pages + GUARD_BYTES + buffer.offset;
  memset(copy.pages, FILL, copy.mapped);
  if (!buffer.is_output || buffer.is_initialised) memcpy(copy.data, buffer.data, buffer.bytes);
  if (run->checked && buffer.is_output) {
    copy.cell_bytes = (buffer.bytes + 1) * sizeof(Cell);
    copy.cells = (Cell*)map_pages(copy.cell_bytes);
  }
  uptr lo = (uptr)copy.data;
  add_region(lo, lo + buffer.bytes, buffer.is_output ? OUTPUT : INPUT, index, copy.cells);
  return copy;
}

static void copy_out(Buffer& buffer, Copy& copy, int index) {
  if (buffer.is_output) memcpy(buffer.data, copy.data, buffer.bytes);
  if (copy.cells && !buffer.is_initialised)
    for (u64 i = 0; i < buffer.bytes; i++) buffer.unwritten += copy.cells[i].write.thread == 0;
  const unsigned char* before = (unsigned char*)copy.pages;  // an unchecked build can stray into the guards
  const unsigned char* after = (unsigned char*)copy.data + buffer.bytes;
  for (size_t i = 0; i < GUARD_BYTES; i++) {
    if (before[i] == FILL && after[i] == FILL) continue;
    Report* r = report(OUT_OF_BOUNDS);
    r->buffer = index;
    snprintf(r->text, sizeof r->text, "bytes around the buffer were overwritten");
    break;
  }
  munmap(copy.pages, copy.mapped);
  if (copy.cells) munmap(copy.cells, copy.cell_bytes);
}

static void watch_image(Cell* threadgroup_cells) {
  u64 lo = run->threadgroup_lo, hi = run->threadgroup_hi;
  for (int i = 0; i < run->n_variables; i++) {
    const Variable& v = run->variables[i];
    add_region(v.address, v.address + v.bytes, THREADGROUP_MEMORY, THREADGROUP_VARIABLE + i,
               threadgroup_cells + (v.address - lo));
  }
  // Tables of constants may be read; between threadgroup variables lie red zones.
  add_region(run->image_lo, hi > lo ? lo : run->image_hi, IMAGE, -1, nullptr);
  if (hi > lo) add_region(hi, run->image_hi, IMAGE, -1, nullptr);
}

// ------------------------------------------------------------------------------------------------ schedules
static u32 random_state;

static u32 next_random() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

template <class T> static void fill_order(T* order, int count) {
  for (int i = 0; i < count; i++) order[i] = run->order == REVERSE ? count - 1 - i : i;
  for (int i = count - 1; run->order == RANDOM && i > 0; i--) {
    int j = (int)(next_random() % (i + 1));
    T swapped = order[i];
    order[i] = order[j];
    order[j] = swapped;
  }
}

// ------------------------------------------------------------------------------------------------ threadgroups
struct Shape {
  u32 threads[3], groups[3];
};

static int start_threads(const Shape& shape, u32 group, u32 number) {
  EmuUint3 at = {group % shape.groups[0], group / shape.groups[0] % shape.groups[1],
                 group / (shape.groups[0] * shape.groups[1])};
  u32 place[3] = {at.x, at.y, at.z}, size[3];
  const u32* full = shape.threads;
  for (int i = 0; i < 3; i++) {  // the last group of a row may be smaller
    u32 rest = run->grid[i] - place[i] * full[i];
    size[i] = rest < full[i] ? rest : full[i];
  }
  int count = (int)(size[0] * size[1] * size[2]), n_simdgroups = (count + LANES - 1) / LANES;
  for (int s = 0; s < n_simdgroups; s++) {
    int left = count - LANES * s;
    simdgroups[s].size = simdgroups[s].live = left < LANES ? left : LANES;
    simdgroups[s].waiting = 0;
  }
  for (int i = 0; i < count; i++) {
    Fiber& fiber = fibers[i];
    fiber.state = READY;
    fiber.index = i;
    fiber.id = number * MAX_THREADS + i;
    fiber.line = fiber.column = 0;
    EmuContext& c = fiber.context;
    u32 x = i % size[0], y = i / size[0] % size[1], z = i / (size[0] * size[1]);
    c.thread_position_in_threadgroup = {x, y, z};
    c.threadgroup_position_in_grid = at;
    c.thread_position_in_grid = {at.x * full[0] + x, at.y * full[1] + y, at.z * full[2] + z};
    c.threads_per_threadgroup = {size[0], size[1], size[2]};
    c.dispatch_threads_per_threadgroup = {full[0], full[1], full[2]};
    c.threadgroups_per_grid = {shape.groups[0], shape.groups[1], shape.groups[2]};
    c.threads_per_grid = {run->grid[0], run->grid[1], run->grid[2]};
    c.thread_index_in_threadgroup = i;
    c.thread_index_in_simdgroup = i % LANES;
    c.simdgroup_index_in_threadgroup = i / LANES;
    c.simdgroups_per_threadgroup = n_simdgroups;
    c.dispatch_simdgroups_per_threadgroup = (full[0] * full[1] * full[2] + LANES - 1) / LANES;
    prepare_stack(&fiber, fiber_main);
  }
  return count;
}

// All simdgroups have stopped: every thread is done, or waits at a threadgroup barrier. Returns false at the end.
static bool pass_barrier(int count) {
  int done = 0, flags = -1;
  Fiber *first = nullptr, *odd = nullptr;
  for (int i = 0; i < count; i++) {
    if (fibers[i].state == DONE) {
      done++;
      continue;
    }
    if (!first) first = &fibers[i];
    if (!fibers[i].waits_with(*first)) odd = &fibers[i];
    flags &= fibers[i].argument;
  }
  if (!first) return false;
  current = first;
  if (odd) {
    Report* r = report(BARRIER);
    r->other = odd->index;
    r->other_line = odd->line;
    r->other_column = odd->column;
    snprintf(r->text, sizeof r->text, "threads wait at different threadgroup_barrier calls");
  } else if (done && run->strict) {
    Report* r = report(BARRIER);
    const char* text = "threadgroup_barrier reached by %d of %d threads; the others have returned";
    snprintf(r->text, sizeof r->text, text, count - done, count);
  }
  if (run->strict && (odd || done)) {
    aborting = true;
    return false;
  }
  run->barriers++;
  if (!pass_threadgroup_barrier(flags)) {
    Report* r = report(BARRIER);
    snprintf(r->text, sizeof r->text, "more than %u barriers in one threadgroup: the rest runs unchecked", MAX_EPOCH);
    run->checked = 0;
    reset_epochs();
  }
  current = nullptr;
  for (int i = 0; i < count; i++)
    if (fibers[i].state == AT_THREADGROUP_BARRIER) fibers[i].state = READY;
  return true;
}

static void run_threadgroup(const Shape& shape, u32 group, u32 number) {
  int count = start_threads(shape, group, number), n_simdgroups = (count + LANES - 1) / LANES;
  do {
    int order[MAX_SIMDGROUPS];
    fill_order(order, n_simdgroups);
    fill_order(lane_order, LANES);
    for (int i = 0; i < n_simdgroups && !aborting; i++) run_simdgroup(order[i]);
  } while (!aborting && pass_barrier(count));
  current = nullptr;
}

static void run_grid(Cell* threadgroup_cells, size_t cell_bytes) {
  Shape shape;
  u32 total = 1;
  for (int i = 0; i < 3; i++) {  // as MLX does, a threadgroup is never larger than the grid
    shape.threads[i] = run->threadgroup[i] < run->grid[i] ? run->threadgroup[i] : run->grid[i];
    shape.groups[i] = (run->grid[i] + shape.threads[i] - 1) / shape.threads[i];
    total *= shape.groups[i];
  }
  random_state = run->seed * 2654435761u + 88172645u;
  Array<u32> order(total);
  fill_order(order.items, (int)total);
  for (u32 i = 0; i < total && !aborting; i++) {
    current_threadgroup = order[i];
    // Nothing is left of the group before: neither values nor the right to read them.
    if (run->threadgroup_hi > run->threadgroup_lo)
      memset((void*)run->threadgroup_lo, FILL, run->threadgroup_hi - run->threadgroup_lo);
    if (threadgroup_cells) memset(threadgroup_cells, 0, cell_bytes);
    reset_epochs();
    run_threadgroup(shape, order[i], i);
  }
}

// ------------------------------------------------------------------------------------------------ denormals
#if defined(__x86_64__)
static const u64 FLUSH_DENORMALS = 0x8040;
static u64 get_float_mode() { return __builtin_ia32_stmxcsr(); }
static void set_float_mode(u64 mode) { __builtin_ia32_ldmxcsr((u32)mode); }
#else
static const u64 FLUSH_DENORMALS = 1 << 24;
static u64 get_float_mode() {
  u64 mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
static void set_float_mode(u64 mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#endif

extern "C" void emu_run(Run* asked) {
  run = asked;
  current = nullptr;
  aborting = false;
  n_regions = 0;
  last_region = nullptr;
  allocate_fibers();
  Array<Copy> copies(run->n_buffers);
  Array<void*> arguments(run->n_buffers);
  for (int i = 0; i < run->n_buffers; i++) {
    copies[i] = copy_in(run->buffers[i], i);
    arguments[i] = copies[i].data;
  }
  kernel_arguments = arguments.items;
  size_t threadgroup_bytes = run->threadgroup_hi - run->threadgroup_lo;
  Array<Cell> threadgroup_cells(run->checked ? threadgroup_bytes : 0);
  watch_image(threadgroup_cells.items);
  catch_crashes();
  u64 float_mode = get_float_mode();
  if (run->flush_denormals) set_float_mode(float_mode | FLUSH_DENORMALS);
  run_grid(run->checked ? threadgroup_cells.items : nullptr, threadgroup_bytes * sizeof(Cell));
  set_float_mode(float_mode);
  release_crashes();
  current = nullptr;
  for (int i = 0; i < run->n_buffers; i++) copy_out(run->buffers[i], copies[i], i);
  run = nullptr;
}
