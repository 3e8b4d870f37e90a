// Barriers, and functions in which the lanes of a simdgroup or quadgroup take part together.
#pragma once
#include "context.h"
#include "integers.h"

namespace metal {
enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
MSL_INL void threadgroup_barrier(mem_flags f, MSL_SITE) MSL_BODY(emu_threadgroup_barrier((int)f, MSL_PASS);)
MSL_INL void simdgroup_barrier(mem_flags f, MSL_SITE) MSL_BODY(emu_simdgroup_barrier((int)f, MSL_PASS);)

// The public functions take half/float/8..32-bit integers and their vectors
// (not bool, bfloat or 64-bit: MLX adds those itself in bf16_math.h / utils.h).
template <class T> struct __simd_element : false_type {};
#define MSL_T(T) \
  template <> struct __simd_element<T> : true_type {};
MSL_T(half)
MSL_T(float)
MSL_T(char)
MSL_T(signed char)
MSL_T(uchar)
MSL_T(short)
MSL_T(ushort)
MSL_T(int)
MSL_T(uint)
#undef MSL_T
#define MSL_SIMD_T class T, class = enable_if_t<__simd_element<typename __vector<T>::e>::value>
#ifdef MSL_RUN
template <class T>
METAL_FUNC T __exchange(T value, int lane, EmuShuffle shuffle, int line, int column, const char* file) {
  emu_exchange(&value, sizeof(T), lane, shuffle, line, column, file);
  return value;
}
template <class T>
METAL_FUNC T __reduce(T value, void (*combine)(const void*, void*, unsigned), int line, int column, const char* file) {
  emu_reduce(&value, sizeof(T), combine, line, column, file);
  return value;
}

// MLX asks for the xor of bfloats by way of float, where Metal combines the bits.
template <class T> METAL_FUNC T __xor(T a, T b) { return a ^ b; }
METAL_FUNC float __xor(float a, float b) { return as_type<float>(as_type<uint>(a) ^ as_type<uint>(b)); }

// An operation on two values, and its neutral element.
template <class T, bool is_float> struct __Limits {
  static T lo() { return -numeric_limits<T>::infinity(); }
  static T hi() { return numeric_limits<T>::infinity(); }
};
template <class T> struct __Limits<T, false> {
  static T lo() { return numeric_limits<T>::min(); }
  static T hi() { return numeric_limits<T>::max(); }
};
#define MSL_OPERATION(name, operation, neutral)                         \
  struct name {                                                         \
    template <class T> static T combine(T a, T b) { return operation; } \
    template <class T> static T identity() {                            \
      typedef typename __vector<T>::e E;                                \
      typedef __Limits<E, is_floating_point<E>::value> L;               \
      (void)sizeof(L);                                                  \
      T r;                                                              \
      r = (T)(E)(neutral);                                              \
      return r;                                                         \
    }                                                                   \
  };
MSL_OPERATION(__Sum, a + b, 0)
MSL_OPERATION(__Times, (a * b), 1)
MSL_OPERATION(__Max, max(a, b), L::lo())
MSL_OPERATION(__Min, min(a, b), L::hi())
MSL_OPERATION(__And, (a & b), ~0)
MSL_OPERATION(__Or, a | b, 0)
MSL_OPERATION(__Xor, __xor(a, b), 0)

// What the active lanes (mask) make together; in and out hold 32 values.
template <class Op, class T> struct __Combine {
  static void all(const void* in, void* out, unsigned mask) {
    const T* from = (const T*)in;
    T* to = (T*)out;
    T part[32];
    for (int i = 0; i < 32; i++) part[i] = mask >> i & 1 ? from[i] : Op::template identity<T>();
    for (int half_size = 16; half_size; half_size >>= 1)
      for (int i = 0; i < half_size; i++) part[i] = Op::combine(part[i], part[i + half_size]);
    for (int i = 0; i < 32; i++) to[i] = part[0];
  }
  static void inclusive(const void* in, void* out, unsigned mask) {
    T so_far = Op::template identity<T>();
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) ((T*)out)[i] = so_far = Op::combine(so_far, ((const T*)in)[i]);
  }
  static void exclusive(const void* in, void* out, unsigned mask) {
    T so_far = Op::template identity<T>();
    for (int i = 0; i < 32; i++) {
      if (!(mask >> i & 1)) continue;
      ((T*)out)[i] = so_far;
      so_far = Op::combine(so_far, ((const T*)in)[i]);
    }
  }
};
#endif
#define MSL_RED(name, OP, WHICH)                                        \
  template <class T> METAL_FUNC T __metal_##name(T x, MSL_SITE)         \
      MSL_BODY(return __reduce(x, &__Combine<OP, T>::WHICH, MSL_PASS);) \
  template <MSL_SIMD_T> METAL_FUNC T name(T x, MSL_SITE) MSL_BODY(return __metal_##name(x, MSL_PASS);)
MSL_RED(simd_sum, __Sum, all)
MSL_RED(simd_product, __Times, all)
MSL_RED(simd_max, __Max, all)
MSL_RED(simd_min, __Min, all)
MSL_RED(simd_and, __And, all)
MSL_RED(simd_or, __Or, all)
MSL_RED(simd_xor, __Xor, all)
MSL_RED(simd_prefix_inclusive_sum, __Sum, inclusive)
MSL_RED(simd_prefix_exclusive_sum, __Sum, exclusive)
MSL_RED(simd_prefix_inclusive_product, __Times, inclusive)
MSL_RED(simd_prefix_exclusive_product, __Times, exclusive)
#define MSL_SHUF(name, ARG, KIND)                                           \
  template <class T> METAL_FUNC T __metal_##name(T x, ushort ARG, MSL_SITE) \
      MSL_BODY(return __exchange(x, (int)ARG, KIND, MSL_PASS);)             \
  template <MSL_SIMD_T> METAL_FUNC T name(T x, ushort ARG, MSL_SITE) MSL_BODY(return __metal_##name(x, ARG, MSL_PASS);)
MSL_SHUF(simd_shuffle, lane, EMU_LANE)
MSL_SHUF(simd_shuffle_down, delta, EMU_DOWN)
MSL_SHUF(simd_shuffle_up, delta, EMU_UP)
MSL_SHUF(simd_shuffle_xor, mask, EMU_XOR)
MSL_SHUF(simd_broadcast, lane, EMU_BROADCAST)
MSL_SHUF(simd_shuffle_rotate_down, delta, EMU_ROTATE_DOWN)
MSL_SHUF(simd_shuffle_rotate_up, delta, EMU_ROTATE_UP)
// Blocks of `modulo` lanes; a lane that would read beyond its block reads the fill of the lane it wraps to.
#define MSL_FILL(name, FROM, INSIDE)                                                                                   \
  template <class T> METAL_FUNC T __metal_##name(T x, T fill, ushort delta, ushort modulo, MSL_SITE)                   \
      MSL_BODY(uint in_block = emu_lane() & (modulo - 1u); uint block = emu_lane() - in_block;                         \
               int from = (int)(block | ((FROM) & (modulo - 1u))); T inside = __exchange(x, from, EMU_LANE, MSL_PASS); \
               T outside = __exchange(fill, from, EMU_LANE, MSL_PASS); return (INSIDE) ? inside : outside;)            \
  template <MSL_SIMD_T> METAL_FUNC T name(T x, T fill, ushort delta, ushort modulo = 32, MSL_SITE)                     \
      MSL_BODY(return __metal_##name(x, fill, delta, modulo, MSL_PASS);)
MSL_FILL(simd_shuffle_and_fill_down, in_block + delta, in_block + delta < modulo)
MSL_FILL(simd_shuffle_and_fill_up, in_block - delta, in_block >= delta)
MSL_INL ushort __metal_get_simdgroup_size(ushort) MSL_E((ushort)32)
template <MSL_SIMD_T> METAL_FUNC T simd_broadcast_first(T x, MSL_SITE)
    MSL_BODY(return __exchange(x, -1, EMU_BROADCAST, MSL_PASS);)

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
#ifdef MSL_RUN
struct __Vote {
  static void ballot(const void* in, void* out, unsigned mask) {
    uint votes = 0;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1 && ((const uint*)in)[i]) votes |= 1u << i;
    for (int i = 0; i < 32; i++) ((uint*)out)[i] = votes;
  }
  static void active(const void*, void* out, unsigned mask) {
    for (int i = 0; i < 32; i++) ((uint*)out)[i] = mask;
  }
};
METAL_FUNC simd_vote simd_ballot(bool p, MSL_SITE) {
  return simd_vote((ulong)__reduce((uint)p, &__Vote::ballot, MSL_PASS));
}
METAL_FUNC simd_vote simd_active_threads_mask(MSL_SITE) {
  return simd_vote((ulong)__reduce(0u, &__Vote::active, MSL_PASS));
}
METAL_FUNC bool simd_any(bool p, MSL_SITE) { return __reduce((uint)p, &__Vote::ballot, MSL_PASS) != 0; }
METAL_FUNC bool simd_all(bool p, MSL_SITE) { return __reduce((uint)!p, &__Vote::ballot, MSL_PASS) == 0; }
METAL_FUNC bool simd_is_first(MSL_SITE) {
  uint m = __reduce(0u, &__Vote::active, MSL_PASS);
  return (uint)__builtin_ctz(m) == emu_lane();
}
#else
simd_vote simd_ballot(bool p);
simd_vote simd_active_threads_mask();
bool simd_any(bool p);
bool simd_all(bool p);
bool simd_is_first();
#endif
// quadgroup = 4 consecutive lanes
template <MSL_SIMD_T> METAL_FUNC T quad_shuffle_xor(T x, ushort m, MSL_SITE)
    MSL_BODY(return __exchange(x, (int)(m & 3), EMU_XOR, MSL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_shuffle(T x, ushort k, MSL_SITE)
    MSL_BODY(return __exchange(x, (int)((emu_lane() & ~3u) | (k & 3)), EMU_LANE, MSL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_broadcast(T x, ushort k, MSL_SITE)
    MSL_BODY(return __exchange(x, (int)((emu_lane() & ~3u) | (k & 3)), EMU_LANE, MSL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_sum(T x, MSL_SITE)
    MSL_BODY(T y = x + __exchange(x, 1, EMU_XOR, MSL_PASS); return y + __exchange(y, 2, EMU_XOR, MSL_PASS);)
template <MSL_SIMD_T> METAL_FUNC T quad_max(T x, MSL_SITE)
    MSL_BODY(T y = max(x, __exchange(x, 1, EMU_XOR, MSL_PASS)); return max(y, __exchange(y, 2, EMU_XOR, MSL_PASS));)

}  // namespace metal
