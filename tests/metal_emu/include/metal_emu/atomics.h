// Atomic types and operations. One OS thread runs all, so plain operations are atomic.
#pragma once
#include "context.h"
#include "vectors.h"

namespace metal {
enum memory_order { memory_order_relaxed };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
#ifdef MSL_Q  // predeclared by clang in OpenCL 2+ modes
#define atomic_int __msl_atomic_int
#define atomic_uint __msl_atomic_uint
#define atomic_float __msl_atomic_float
#define atomic_flag __msl_atomic_flag
#define atomic_long __msl_atomic_long
#define atomic_ulong __msl_atomic_ulong
#endif
template <class T> struct atomic { typedef T value_type; T __v; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
#ifdef MSL_P
#define MSL_NOSAN __attribute__((no_sanitize("thread"), noinline))
template <class P> MSL_NOSAN typename P::value_type atomic_load_explicit(P* p, memory_order) { emu_atomic((const volatile void*)p, sizeof(p->__v), 1); return p->__v; }
template <class P, class U> MSL_NOSAN void atomic_store_explicit(P* p, U v, memory_order) { emu_atomic((const volatile void*)p, sizeof(p->__v), 0); p->__v = v; }
#define MSL_RMW(name, ...) template <class P, class U> MSL_NOSAN typename P::value_type name(P* p, U v, memory_order) { \
  emu_atomic((const volatile void*)p, sizeof(p->__v), 1); typename P::value_type o = p->__v, n = (typename P::value_type)v; (void)n; p->__v = __VA_ARGS__; return o; }
MSL_RMW(atomic_exchange_explicit, n) MSL_RMW(atomic_fetch_add_explicit, o + n) MSL_RMW(atomic_fetch_sub_explicit, o - n)
MSL_RMW(atomic_fetch_and_explicit, o & n) MSL_RMW(atomic_fetch_or_explicit, o | n) MSL_RMW(atomic_fetch_xor_explicit, o ^ n)
MSL_RMW(atomic_fetch_max_explicit, o > n ? o : n) MSL_RMW(atomic_fetch_min_explicit, o < n ? o : n)
template <class P, class U> MSL_NOSAN bool atomic_compare_exchange_weak_explicit(P* p, thread U* e, U v, memory_order, memory_order) {
  emu_atomic((const volatile void*)p, sizeof(p->__v), 1); if (p->__v == *e) { p->__v = v; return true; } *e = p->__v; return false; }
#else
template <class P> typename P::value_type atomic_load_explicit(P* p, memory_order);
template <class P, class U> void atomic_store_explicit(P* p, U v, memory_order);
#define MSL_RMW(name) template <class P, class U> typename P::value_type name(P* p, U v, memory_order);
MSL_RMW(atomic_exchange_explicit) MSL_RMW(atomic_fetch_add_explicit) MSL_RMW(atomic_fetch_sub_explicit) MSL_RMW(atomic_fetch_and_explicit)
MSL_RMW(atomic_fetch_or_explicit) MSL_RMW(atomic_fetch_xor_explicit) MSL_RMW(atomic_fetch_max_explicit) MSL_RMW(atomic_fetch_min_explicit)
template <class P, class U> bool atomic_compare_exchange_weak_explicit(P* p, thread U* e, U v, memory_order, memory_order);
#endif

}  // namespace metal
