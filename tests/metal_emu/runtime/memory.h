// Checks of every access: bounds, alignment, data races and reads of memory that was never written.
//
// Races are found by epochs. A byte remembers who wrote it, its last readers, and when: the number of barriers of the
// threadgroup and of the simdgroup passed until then, counted for each memory separately since a barrier orders only
// the memory its flags name. Two accesses are ordered if one thread made both, or a barrier that both threads pass,
// with the right flag, lies between. Nothing orders two threadgroups.
#pragma once
#include "fiber.h"

enum Space { DEVICE, THREADGROUP };
enum MemFlags { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };

struct Access {
  u32 thread, epoch;  // id + 1, or 0 for nobody; when
};

static const u32 ATOMIC_WRITER = 0xffffffff;

struct Cell {  // one byte of memory; 32 bytes
  Access write, read, other_read;
  u32 write_pc, read_pc;
};

enum RegionKind { INPUT, OUTPUT, THREADGROUP_MEMORY, IMAGE };

struct Region {
  uptr lo, hi;
  RegionKind kind;
  int buffer;
  Cell* cells;
};

static const int MAX_REGIONS = 256;
static Region regions[MAX_REGIONS];
static int n_regions;
static Region* last_region;
static u32 threadgroup_epoch[2], simdgroup_epoch[MAX_SIMDGROUPS][2];
static const u32 MAX_EPOCH = 65000;  // an epoch is packed into 16 bits

static Region* add_region(uptr lo, uptr hi, RegionKind kind, int buffer, Cell* cells) {
  if (n_regions == MAX_REGIONS) abort();  // the Python side counts first
  regions[n_regions] = {lo, hi, kind, buffer, cells};
  return &regions[n_regions++];
}

static Region* find_region(uptr address) {
  if (last_region && address >= last_region->lo && address < last_region->hi) return last_region;
  for (int i = 0; i < n_regions; i++)
    if (address >= regions[i].lo && address < regions[i].hi) return last_region = &regions[i];
  return nullptr;
}

static u32 kernel_pc(const void* pc) { return (u32)((u64)pc - run->image_lo); }

static void reset_epochs() {
  for (int space = 0; space < 2; space++) {
    threadgroup_epoch[space] = 1;
    for (int s = 0; s < MAX_SIMDGROUPS; s++) simdgroup_epoch[s][space] = 1;
  }
}

static void pass_simdgroup_barrier(int simdgroup, int flags) {
  if (flags & MEM_DEVICE) simdgroup_epoch[simdgroup][DEVICE]++;
  if (flags & MEM_THREADGROUP) simdgroup_epoch[simdgroup][THREADGROUP]++;
}

static bool pass_threadgroup_barrier(int flags) {
  if (flags & MEM_DEVICE) threadgroup_epoch[DEVICE]++;
  if (flags & MEM_THREADGROUP) threadgroup_epoch[THREADGROUP]++;
  return threadgroup_epoch[DEVICE] < MAX_EPOCH && threadgroup_epoch[THREADGROUP] < MAX_EPOCH;
}

static u32 epoch_now(Space space) {
  return threadgroup_epoch[space] << 16 | (simdgroup_epoch[current->simdgroup()][space] & 0xffff);
}

// Is an earlier access ordered before one that the current thread makes now?
static bool ordered(Access earlier, Space space) {
  u32 thread = earlier.thread - 1;
  if (thread == current->id) return true;
  if (thread / MAX_THREADS != current->id / MAX_THREADS) return false;
  if (earlier.epoch >> 16 < threadgroup_epoch[space]) return true;
  u32 simdgroup = thread % MAX_THREADS / LANES;
  return (int)simdgroup == current->simdgroup() &&
         (earlier.epoch & 0xffff) < (simdgroup_epoch[simdgroup][space] & 0xffff);
}

static Report* report_access(Kind kind, const Region* region, uptr address, const void* pc) {
  Report* r = report(kind);
  r->pc = kernel_pc(pc);
  if (region) {
    r->buffer = region->buffer;
    r->offset = (i64)(address - region->lo);
  }
  return r;
}

static bool already_reported(Kind kind, u32 pc, u32 other_pc) {
  for (int i = 0; i < run->n_reports; i++) {
    const Report& r = run->reports[i];
    if (r.kind == kind && r.pc == pc && r.other_pc == other_pc) return true;
  }
  return false;
}

[[noreturn]] static void report_out_of_bounds(uptr address, unsigned bytes, bool writes, const void* pc) {
  Region* nearest = nullptr;  // most likely the one that was meant
  u64 least = ~(u64)0;
  for (int i = 0; i < n_regions; i++) {
    Region& region = regions[i];
    u64 distance = address < region.lo ? region.lo - address : address - region.hi;
    if (region.kind != IMAGE && distance < least) {
      least = distance;
      nearest = &region;
    }
  }
  Report* r = report_access(OUT_OF_BOUNDS, nearest, address, pc);
  snprintf(r->text, sizeof r->text, "out-of-bounds %s of %u bytes", writes ? "write" : "read", bytes);
  abort_run();
}

static void report_race(const Region& region, uptr address, const void* pc, Access other, u32 other_pc,
                        const char* what) {
  if (already_reported(RACE, kernel_pc(pc), other_pc)) return;
  Report* r = report_access(RACE, &region, address, pc);
  r->other_pc = other_pc;
  r->other = (other.thread - 1) % MAX_THREADS;
  bool elsewhere = (other.thread - 1) / MAX_THREADS != current->id / MAX_THREADS;
  snprintf(r->text, sizeof r->text, "data race (%s)%s", what, elsewhere ? " with another threadgroup" : "");
}

static void report_uninitialised(const Region& region, uptr address, const void* pc) {
  if (already_reported(UNINITIALISED, kernel_pc(pc), 0)) return;
  Report* r = report_access(UNINITIALISED, &region, address, pc);
  const char* memory = region.kind == THREADGROUP_MEMORY ? "threadgroup" : "output";
  snprintf(r->text, sizeof r->text, "read of %s memory that was never written", memory);
}

static void write_byte(Cell& cell, const Region& region, uptr address, Access now, Space space, const void* pc) {
  if (cell.read.thread) {
    Access read = !ordered(cell.read, space) ? cell.read : cell.other_read;
    if (read.thread && !ordered(read, space)) report_race(region, address, pc, read, cell.read_pc, "write after read");
  }
  cell.write = now;
  cell.write_pc = kernel_pc(pc);
  cell.read = cell.other_read = {0, 0};
}

// Two readers are kept, of different simdgroups if possible: a later write that is ordered after both is ordered
// after all, but for readers of a third simdgroup.
static void read_byte(Cell& cell, Access now, Space space, const void* pc) {
  bool later = cell.read.epoch != now.epoch && cell.read.thread && ordered(cell.read, space);
  if (!cell.read.thread || cell.read.thread == now.thread || later) {
    cell.read = now;
    cell.read_pc = kernel_pc(pc);
    if (later) cell.other_read = {0, 0};
  } else if (!cell.other_read.thread || (cell.other_read.thread - 1) / LANES == (cell.read.thread - 1) / LANES) {
    cell.other_read = now;
  }
}

static void check_access(void* pointer, unsigned bytes, bool writes, bool aligned, const void* pc) {
  uptr address = (uptr)pointer;
  if (is_private(address) || !run || !run->checked || !current) return;
  run->accesses++;
  Region* region = find_region(address);
  if (region && region->kind == IMAGE) return;
  if (!region || address + bytes > region->hi) report_out_of_bounds(address, bytes, writes, pc);
  if (aligned && address & (bytes - 1)) {
    Report* r = report_access(MISALIGNED, region, address, pc);
    snprintf(r->text, sizeof r->text, "misaligned %u-byte %s", bytes, writes ? "write" : "read");
    abort_run();
  }
  if (region->kind == INPUT) {
    if (!writes) return;
    Report* r = report_access(WRITE_TO_INPUT, region, address, pc);
    snprintf(r->text, sizeof r->text, "write to an input");
    abort_run();
  }
  Space space = region->kind == OUTPUT ? DEVICE : THREADGROUP;
  bool starts_written = region->kind == OUTPUT && run->buffers[region->buffer].is_initialised;
  Access now = {current->id + 1, epoch_now(space)};
  for (unsigned i = 0; i < bytes; i++) {
    Cell& cell = region->cells[address - region->lo + i];
    if (cell.write.thread && cell.write.thread != ATOMIC_WRITER && !ordered(cell.write, space)) {
      const char* what = writes ? "write after write" : "read after write";
      report_race(*region, address + i, pc, cell.write, cell.write_pc, what);
    }
    if (writes) {
      write_byte(cell, *region, address + i, now, space, pc);
    } else {
      if (!cell.write.thread && !starts_written) report_uninitialised(*region, address + i, pc);
      read_byte(cell, now, space, pc);
    }
  }
}

extern "C" void emu_atomic(const volatile void* pointer, unsigned bytes, int reads, int line, int column,
                           const char* file) {
  if (!run->checked || is_private((uptr)pointer)) return;
  uptr address = (uptr)pointer;
  const void* pc = __builtin_return_address(0);
  emu_place(line, column, file);
  Region* region = find_region(address);
  if (!region || address + bytes > region->hi) report_out_of_bounds(address, bytes, true, pc);
  if (!region->cells) return;
  bool starts_written = region->kind == OUTPUT && run->buffers[region->buffer].is_initialised;
  for (unsigned i = 0; i < bytes; i++) {
    Cell& cell = region->cells[address - region->lo + i];
    if (reads && !cell.write.thread && !starts_written) report_uninitialised(*region, address + i, pc);
    cell.write.thread = ATOMIC_WRITER;
  }
}
