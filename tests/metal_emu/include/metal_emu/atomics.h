// Atomic types and operations. One OS thread runs all, so plain operations on the CPU are atomic.
#pragma once
#include "context.h"
#include "vectors.h"

namespace metal {
enum memory_order { memory_order_relaxed };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
#ifdef MSL_CHECK  // clang has its own types of these names in OpenCL
#define atomic_int __msl_atomic_int
#define atomic_uint __msl_atomic_uint
#define atomic_float __msl_atomic_float
#define atomic_flag __msl_atomic_flag
#define atomic_long __msl_atomic_long
#define atomic_ulong __msl_atomic_ulong
#endif
template <class T> struct atomic {
  typedef T value_type;
  T __value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

#ifdef MSL_RUN
// The checker is told of the whole operation, not of its parts.
#define MSL_ATOMIC __attribute__((no_sanitize("thread"), noinline))
#define MSL_TELL(reads) emu_atomic((const volatile void*)p, sizeof(p->__value), reads, MSL_PASS)
template <class P> MSL_ATOMIC typename P::value_type atomic_load_explicit(P* p, memory_order, MSL_SITE) {
  MSL_TELL(1);
  return p->__value;
}
template <class P, class U> MSL_ATOMIC void atomic_store_explicit(P* p, U value, memory_order, MSL_SITE) {
  MSL_TELL(0);
  p->__value = value;
}
// o is the old value, v the operand
#define MSL_RMW(name, ...)                                                                                    \
  template <class P, class U> MSL_ATOMIC typename P::value_type name(P* p, U value, memory_order, MSL_SITE) { \
    MSL_TELL(1);                                                                                              \
    typename P::value_type o = p->__value, v = (typename P::value_type)value;                                 \
    (void)v;                                                                                                  \
    p->__value = __VA_ARGS__;                                                                                 \
    return o;                                                                                                 \
  }
template <class P, class U> MSL_ATOMIC bool atomic_compare_exchange_weak_explicit(P* p, thread U* expected, U value,
                                                                                  memory_order, memory_order,
                                                                                  MSL_SITE) {
  MSL_TELL(1);
  bool equal = p->__value == *expected;
  if (equal)
    p->__value = value;
  else
    *expected = p->__value;
  return equal;
}
#else
template <class P> typename P::value_type atomic_load_explicit(P* p, memory_order);
template <class P, class U> void atomic_store_explicit(P* p, U value, memory_order);
#define MSL_RMW(name, ...) template <class P, class U> typename P::value_type name(P* p, U value, memory_order);
template <class P, class U>
bool atomic_compare_exchange_weak_explicit(P* p, thread U* expected, U value, memory_order, memory_order);
#endif
MSL_RMW(atomic_exchange_explicit, v)
MSL_RMW(atomic_fetch_add_explicit, o + v)
MSL_RMW(atomic_fetch_sub_explicit, o - v)
MSL_RMW(atomic_fetch_and_explicit, o& v)
MSL_RMW(atomic_fetch_or_explicit, o | v)
MSL_RMW(atomic_fetch_xor_explicit, o ^ v)
MSL_RMW(atomic_fetch_max_explicit, o > v ? o : v)
MSL_RMW(atomic_fetch_min_explicit, o < v ? o : v)
}  // namespace metal
