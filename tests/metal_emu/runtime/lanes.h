// Lanes of a simdgroup meet at simd operations and barriers: the scheduling points, where divergence shows.
#pragma once
#include "fiber.h"
#include "memory.h"

static int lane_order[LANES];

static Fiber* next_ready(int simdgroup, int lane) {
  Fiber* lanes = fibers + simdgroup * LANES;
  int size = simdgroups[simdgroup].size;
  for (int step = 1; step <= size; step++) {
    Fiber* fiber = lanes + (lane + step) % size;
    if (fiber->state == READY) return fiber;
  }
  return nullptr;
}

// Go on with another fiber, or with the scheduler if there is none.
static void yield_to(Fiber* from, Fiber* to) {
  run->switches++;
  current = to;
  if (to != from) emu_switch(&from->stack_pointer, to ? to->stack_pointer : main_stack_pointer);
}

// The lane that `fiber` reads in a shuffle.
static int source_lane(const Fiber& fiber, int first, int first_argument) {
  int lane = fiber.lane(), by = fiber.argument;
  switch (fiber.shuffle) {
    case EMU_DOWN:
      return lane + by < LANES ? lane + by : lane;
    case EMU_UP:
      return lane - by >= 0 ? lane - by : lane;
    case EMU_XOR:
      return lane ^ by;
    case EMU_ROTATE_DOWN:
      return (lane + by) % LANES;
    case EMU_ROTATE_UP:
      return (lane - by) & (LANES - 1);
    case EMU_BROADCAST:
      if (by != first_argument) {
        Report* r = report(SIMD_SHUFFLE);
        snprintf(r->text, sizeof r->text, "simd_broadcast wants one lane for all, got %d and %d", by, first_argument);
      }
      return by < 0 ? first : by;
    default:
      return by;
  }
}

static void exchange(Simdgroup& group, Fiber* lanes, u32 mask) {
  int first = __builtin_ctz(mask);
  u32 size = lanes[first].size;
  for (int l = 0; l < group.size; l++)
    if (mask >> l & 1) memcpy(group.in + l * size, lanes[l].value, size);
  if (lanes[first].combine) {
    lanes[first].combine(group.in, group.out, mask);
  } else {
    for (int l = 0; l < group.size; l++) {
      if (!(mask >> l & 1)) continue;
      current = lanes + l;
      int from = source_lane(lanes[l], first, lanes[first].argument);
      if (from >= 0 && from < LANES && (mask >> from & 1)) {
        memcpy(group.out + l * size, group.in + from * size, size);
        continue;
      }
      Report* r = report(SIMD_SHUFFLE);
      snprintf(r->text, sizeof r->text, "lane %d reads lane %d, which is out of range or inactive", l, from);
      memset(group.out + l * size, 0xCD, size);
    }
  }
  for (int l = 0; l < group.size; l++)
    if (mask >> l & 1) memcpy(lanes[l].value, group.out + l * size, size);
}

// The lanes of `mask` have met: do what they came for and let them go.
static void resolve(int simdgroup, u32 mask) {
  Simdgroup& group = simdgroups[simdgroup];
  Fiber* lanes = fibers + simdgroup * LANES;
  Fiber& first = lanes[__builtin_ctz(mask)];
  run->collectives++;
  if (first.state == AT_SIMDGROUP_BARRIER)
    pass_simdgroup_barrier(simdgroup, first.argument);
  else
    exchange(group, lanes, mask);
  for (int l = 0; l < group.size; l++)
    if (mask >> l & 1) lanes[l].state = READY;
  group.waiting -= __builtin_popcount(mask);
}

static void wait_at(State state, int line, int column, const char* file) {
  Fiber* me = current;
  me->state = state;
  emu_place(line, column, file);
  int simdgroup = me->simdgroup();
  Simdgroup& group = simdgroups[simdgroup];
  // The last lane to arrive does the work for all, if all wait at this very call.
  if (state != AT_THREADGROUP_BARRIER && ++group.waiting == group.live) {
    Fiber* lanes = fibers + simdgroup * LANES;
    u32 mask = 0;
    bool together = true;
    for (int l = 0; l < group.size && together; l++) {
      if (lanes[l].state == DONE) continue;
      together = lanes[l].waits_with(*me);
      mask |= 1u << l;
    }
    if (together) {
      resolve(simdgroup, mask);
      current = me;
      return;
    }
  }
  yield_to(me, next_ready(simdgroup, me->lane()));
}

static void exchange_value(void* value, unsigned size, int line, int column, const char* file) {
  Fiber* me = current;
  if (size > SLOT_BYTES) abort();
  memcpy(me->value, value, size);
  me->size = size;
  wait_at(AT_SIMD_OPERATION, line, column, file);
  memcpy(value, me->value, size);
}

extern "C" {
unsigned emu_lane() { return current->lane(); }

void emu_exchange(void* value, unsigned size, int lane, int shuffle, int line, int column, const char* file) {
  current->combine = nullptr;
  current->argument = lane;
  current->shuffle = shuffle;
  exchange_value(value, size, line, column, file);
}

void emu_reduce(void* value, unsigned size, void (*combine)(const void*, void*, unsigned), int line, int column,
                const char* file) {
  current->combine = combine;
  exchange_value(value, size, line, column, file);
}

void emu_simdgroup_barrier(int flags, int line, int column, const char* file) {
  current->argument = flags;
  wait_at(AT_SIMDGROUP_BARRIER, line, column, file);
}

void emu_threadgroup_barrier(int flags, int line, int column, const char* file) {
  current->argument = flags;
  wait_at(AT_THREADGROUP_BARRIER, line, column, file);
}
}

static void fiber_main() {
  Fiber* me = current;
  run->entry(kernel_arguments, &me->context);
  me->state = DONE;
  simdgroups[me->simdgroup()].live--;
  yield_to(me, next_ready(me->simdgroup(), me->lane()));
  abort();  // a fiber that is done is never resumed
}

static void report_divergence(const Fiber& one, const Fiber& other) {
  current = const_cast<Fiber*>(&one);
  Report* r = report(SIMD_DIVERGENCE);
  r->other = other.index;
  r->other_line = other.line;
  r->other_column = other.column;
  snprintf(r->text, sizeof r->text, "lanes of one simdgroup wait at different simd operations or barriers");
}

// Lanes wait at different places. Let those at the first place in the text go on, or report them if that is an error.
// Returns false if nothing more can be done before the other simdgroups have arrived.
static bool resolve_divergence(int simdgroup) {
  Simdgroup& group = simdgroups[simdgroup];
  Fiber* lanes = fibers + simdgroup * LANES;
  Fiber *first = nullptr, *odd = nullptr, *earliest = nullptr;
  for (int l = 0; l < group.size; l++) {
    Fiber& lane = lanes[l];
    if (lane.state == DONE) continue;
    if (!first) first = &lane;
    if (!odd && !lane.waits_with(*first)) odd = &lane;
    if (lane.state == AT_THREADGROUP_BARRIER) continue;
    bool earlier =
        earliest && (lane.line < earliest->line || (lane.line == earliest->line && lane.column < earliest->column));
    if (!earliest || earlier) earliest = &lane;
  }
  if (!earliest) return false;
  if (odd && run->strict) {
    report_divergence(*first, *odd);
    aborting = true;
    return true;
  }
  u32 mask = 0;
  for (int l = 0; l < group.size; l++)
    if (lanes[l].waits_with(*earliest)) mask |= 1u << l;
  resolve(simdgroup, mask);
  return true;
}

// Run a simdgroup until all its lanes are done or wait at a threadgroup barrier.
static void run_simdgroup(int simdgroup) {
  Simdgroup& group = simdgroups[simdgroup];
  while (!aborting) {
    Fiber* next = nullptr;
    for (int i = 0; i < LANES && !next; i++) {
      Fiber* fiber = fibers + simdgroup * LANES + lane_order[i];
      if (lane_order[i] < group.size && fiber->state == READY) next = fiber;
    }
    if (!next) {
      if (!resolve_divergence(simdgroup)) return;
      continue;
    }
    current = next;
    run->switches++;
    emu_switch(&main_stack_pointer, next->stack_pointer);
    current = nullptr;
  }
}
