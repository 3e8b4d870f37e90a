// Barriers, and functions in which the lanes of a simdgroup or quadgroup take part together.
#pragma once
#include "context.h"
#include "integers.h"

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8, mem_object_data = 16 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
MSL_INL void threadgroup_barrier(mem_flags f, __METAL_SITE) MSL_BODY(emu_threadgroup_barrier((int)f, __METAL_PASS);)
MSL_INL void simdgroup_barrier(mem_flags f, __METAL_SITE) MSL_BODY(emu_simdgroup_barrier((int)f, __METAL_PASS);)

// The public functions take half/float/8..32-bit integers and their vectors
// (not bool, bfloat or 64-bit: MLX adds those itself in bf16_math.h / utils.h).
template <class T> struct __simd_elem : false_type {};
#define MSL_T(T) template <> struct __simd_elem<T> : true_type {};
MSL_T(half) MSL_T(float) MSL_T(char) MSL_T(signed char) MSL_T(uchar) MSL_T(short) MSL_T(ushort) MSL_T(int) MSL_T(uint)
#undef MSL_T
#define MSL_SIMD_T class T, class = enable_if_t<__simd_elem<typename __vt<T>::e>::value>
#ifdef MSL_P
template <class T> METAL_FUNC T __xchg(T v, int src, int op, int l, int c) { emu_exchange(&v, sizeof(T), src, op, l, c); return v; }
template <class Op, class T> struct __red {
  static void fn(const void* in, void* out, unsigned mask) {
    const T* a = (const T*)in; T t[32]; T id = Op::template id<T>();
    for (int i = 0; i < 32; i++) t[i] = (mask >> i) & 1 ? a[i] : id;
    for (int s = 16; s; s >>= 1) for (int i = 0; i < s; i++) t[i] = Op::f(t[i], t[i + s]);
    T* o = (T*)out; for (int i = 0; i < 32; i++) o[i] = t[0];
  }
  static void scan_incl(const void* in, void* out, unsigned mask) {
    const T* a = (const T*)in; T* o = (T*)out; T r = Op::template id<T>();
    for (int i = 0; i < 32; i++) if ((mask >> i) & 1) { r = Op::f(r, a[i]); o[i] = r; }
  }
  static void scan_excl(const void* in, void* out, unsigned mask) {
    const T* a = (const T*)in; T* o = (T*)out; T r = Op::template id<T>();
    for (int i = 0; i < 32; i++) if ((mask >> i) & 1) { T v = a[i]; o[i] = r; r = Op::f(r, v); }
  }
};
template <class T> METAL_FUNC T __splat(typename __vt<T>::e x) { T r; r = (T)x; return r; }
struct __op_sum { template <class T> static METAL_FUNC T f(T a, T b) { return a + b; } template <class T> static METAL_FUNC T id() { return __splat<T>(0); } };
struct __op_prod { template <class T> static METAL_FUNC T f(T a, T b) { return a * b; } template <class T> static METAL_FUNC T id() { return __splat<T>(1); } };
template <class T, bool fp> struct __lim { static METAL_FUNC T lo() { return -numeric_limits<T>::infinity(); } static METAL_FUNC T hi() { return numeric_limits<T>::infinity(); } };
template <class T> struct __lim<T, false> { static METAL_FUNC T lo() { return numeric_limits<T>::min(); } static METAL_FUNC T hi() { return numeric_limits<T>::max(); } };
struct __op_max { template <class T> static METAL_FUNC T f(T a, T b) { return max(a, b); } template <class T> static METAL_FUNC T id() { typedef typename __vt<T>::e E; return __splat<T>(__lim<E, is_floating_point<E>::value>::lo()); } };
struct __op_min { template <class T> static METAL_FUNC T f(T a, T b) { return min(a, b); } template <class T> static METAL_FUNC T id() { typedef typename __vt<T>::e E; return __splat<T>(__lim<E, is_floating_point<E>::value>::hi()); } };
struct __op_and { template <class T> static METAL_FUNC T f(T a, T b) { return a & b; } template <class T> static METAL_FUNC T id() { return __splat<T>((typename __vt<T>::e)~0); } };
struct __op_or { template <class T> static METAL_FUNC T f(T a, T b) { return a | b; } template <class T> static METAL_FUNC T id() { return __splat<T>(0); } };
struct __op_xor { static METAL_FUNC float f(float a, float b) { return __builtin_bit_cast(float, __builtin_bit_cast(uint, a) ^ __builtin_bit_cast(uint, b)); }
  template <class T> static METAL_FUNC T f(T a, T b) { return a ^ b; } template <class T> static METAL_FUNC T id() { return __splat<T>(0); } };
template <class T> METAL_FUNC T __redu(T v, void (*fn)(const void*, void*, unsigned), int l, int c) { emu_reduce(&v, sizeof(T), fn, l, c); return v; }
#endif
#define MSL_RED(name, OP, WHICH) \
  template <class T> METAL_FUNC T __metal_##name(T x, __METAL_SITE) MSL_BODY(return __redu(x, &__red<OP, T>::WHICH, __METAL_PASS);) \
  template <MSL_SIMD_T> METAL_FUNC T name(T x, __METAL_SITE) MSL_BODY(return __metal_##name(x, __METAL_PASS);)
MSL_RED(simd_sum, __op_sum, fn) MSL_RED(simd_product, __op_prod, fn) MSL_RED(simd_max, __op_max, fn) MSL_RED(simd_min, __op_min, fn)
MSL_RED(simd_and, __op_and, fn) MSL_RED(simd_or, __op_or, fn) MSL_RED(simd_xor, __op_xor, fn)
MSL_RED(simd_prefix_inclusive_sum, __op_sum, scan_incl) MSL_RED(simd_prefix_exclusive_sum, __op_sum, scan_excl)
MSL_RED(simd_prefix_inclusive_product, __op_prod, scan_incl) MSL_RED(simd_prefix_exclusive_product, __op_prod, scan_excl)
#define MSL_SHUF(name, ARG, KIND) \
  template <class T> METAL_FUNC T __metal_##name(T x, ushort ARG, __METAL_SITE) MSL_BODY(return __xchg(x, (int)ARG, KIND, __METAL_PASS);) \
  template <MSL_SIMD_T> METAL_FUNC T name(T x, ushort ARG, __METAL_SITE) MSL_BODY(return __metal_##name(x, ARG, __METAL_PASS);)
MSL_SHUF(simd_shuffle, lane, EMU_LANE) MSL_SHUF(simd_shuffle_down, delta, EMU_DOWN) MSL_SHUF(simd_shuffle_up, delta, EMU_UP)
MSL_SHUF(simd_shuffle_xor, mask, EMU_XOR) MSL_SHUF(simd_broadcast, lane, EMU_BROADCAST)
MSL_SHUF(simd_shuffle_rotate_down, delta, EMU_ROTATE_DOWN) MSL_SHUF(simd_shuffle_rotate_up, delta, EMU_ROTATE_UP)
template <class T> METAL_FUNC T __metal_simd_shuffle_and_fill_down(T x, T fill, ushort delta, ushort modulo, __METAL_SITE)
  MSL_BODY(uint k = emu_lane(); uint m = modulo; T y = __xchg(x, (int)((k & ~(m - 1)) | ((k + delta) & (m - 1))), EMU_LANE, __METAL_PASS);
           T z = __xchg(fill, (int)((k & ~(m - 1)) | ((k + delta) & (m - 1))), EMU_LANE, __METAL_PASS); return ((k & (m - 1)) + delta) < m ? y : z;)
template <class T> METAL_FUNC T __metal_simd_shuffle_and_fill_up(T x, T fill, ushort delta, ushort modulo, __METAL_SITE)
  MSL_BODY(uint k = emu_lane(); uint m = modulo; T y = __xchg(x, (int)((k & ~(m - 1)) | ((k - delta) & (m - 1))), EMU_LANE, __METAL_PASS);
           T z = __xchg(fill, (int)((k & ~(m - 1)) | ((k - delta) & (m - 1))), EMU_LANE, __METAL_PASS); return (k & (m - 1)) >= delta ? y : z;)
template <MSL_SIMD_T> METAL_FUNC T simd_shuffle_and_fill_down(T x, T fill, ushort delta, ushort modulo = 32) MSL_BODY(return __metal_simd_shuffle_and_fill_down(x, fill, delta, modulo);)
template <MSL_SIMD_T> METAL_FUNC T simd_shuffle_and_fill_up(T x, T fill, ushort delta, ushort modulo = 32) MSL_BODY(return __metal_simd_shuffle_and_fill_up(x, fill, delta, modulo);)
MSL_INL ushort __metal_get_simdgroup_size(ushort) MSL_E((ushort)32)
template <MSL_SIMD_T> METAL_FUNC T simd_broadcast_first(T x, __METAL_SITE)
  MSL_BODY(return __xchg(x, -1, EMU_BROADCAST, __METAL_PASS);)

class simd_vote {
 public:
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t v = 0) : v_(v) {}
  explicit constexpr operator vote_t() const { return v_; }
  bool all() const { return v_ == 0xffffffffull; }
  bool any() const { return v_ != 0; }
 private:
  vote_t v_;
};
#ifdef MSL_P
struct __vote_fn { static void fn(const void* in, void* out, unsigned mask) {
  const uint* a = (const uint*)in; uint* o = (uint*)out; uint r = 0;
  for (int i = 0; i < 32; i++) if (((mask >> i) & 1) && a[i]) r |= 1u << i;
  for (int i = 0; i < 32; i++) o[i] = r; } 
  static void act(const void*, void* out, unsigned mask) { uint* o = (uint*)out; for (int i = 0; i < 32; i++) o[i] = mask; } };
METAL_FUNC simd_vote simd_ballot(bool p, __METAL_SITE) { return simd_vote((ulong)__redu((uint)p, &__vote_fn::fn, __METAL_PASS)); }
METAL_FUNC simd_vote simd_active_threads_mask(__METAL_SITE) { return simd_vote((ulong)__redu(0u, &__vote_fn::act, __METAL_PASS)); }
METAL_FUNC bool simd_any(bool p, __METAL_SITE) { return __redu((uint)p, &__vote_fn::fn, __METAL_PASS) != 0; }
METAL_FUNC bool simd_all(bool p, __METAL_SITE) { return __redu((uint)!p, &__vote_fn::fn, __METAL_PASS) == 0; }
METAL_FUNC bool simd_is_first(__METAL_SITE) { uint m = __redu(0u, &__vote_fn::act, __METAL_PASS); return (uint)__builtin_ctz(m) == emu_lane(); }
#else
simd_vote simd_ballot(bool p);
simd_vote simd_active_threads_mask();
bool simd_any(bool p);
bool simd_all(bool p);
bool simd_is_first();
#endif
// quadgroup = 4 consecutive lanes
template <MSL_SIMD_T> METAL_FUNC T quad_shuffle_xor(T x, ushort m, __METAL_SITE) MSL_BODY(return __xchg(x, (int)(m & 3), EMU_XOR, __METAL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_shuffle(T x, ushort k, __METAL_SITE) MSL_BODY(return __xchg(x, (int)((emu_lane() & ~3u) | (k & 3)), EMU_LANE, __METAL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_broadcast(T x, ushort k, __METAL_SITE) MSL_BODY(return __xchg(x, (int)((emu_lane() & ~3u) | (k & 3)), EMU_LANE, __METAL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_sum(T x, __METAL_SITE) MSL_BODY(T y = x + __xchg(x, 1, EMU_XOR, __METAL_PASS); return y + __xchg(y, 2, EMU_XOR, __METAL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_max(T x, __METAL_SITE) MSL_BODY(T y = max(x, __xchg(x, 1, EMU_XOR, __METAL_PASS)); return max(y, __xchg(y, 2, EMU_XOR, __METAL_PASS));)

}  // namespace metal
