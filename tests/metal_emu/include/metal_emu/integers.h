// Functions of integers and masks, and packing.
#pragma once
#include "math.h"

namespace metal {
#define MSL_I2(name, T, ...)                  \
  MSL_INL T name(T x, T y) MSL_E(__VA_ARGS__) \
  MSL_VEC2(name, T)
#define MSL_I1(name, T, ...)             \
  MSL_INL T name(T x) MSL_E(__VA_ARGS__) \
  MSL_VEC1(T, name, T)
#define MSL_I3(name, T, ...)                       \
  MSL_INL T name(T x, T y, T z) MSL_E(__VA_ARGS__) \
  MSL_VEC3(name, T)
#define MSL_INT(T, U)                                                                                                 \
  MSL_I2(max, T, (T)(x > y ? x : y))                                                                                  \
  MSL_I2(min, T, (T)(x < y ? x : y))                                                                                  \
  MSL_I3(clamp, T, (T)(x < y ? y : (x > z ? z : x)))                                                                  \
  MSL_I3(max3, T, max(x, max(y, z)))                                                                                  \
  MSL_I3(min3, T, min(x, min(y, z)))                                                                                  \
  MSL_I1(popcount, T, (T)__builtin_popcountl((ulong)(U)x))                                                            \
  MSL_I1(clz, T, (T)((U)x == 0 ? sizeof(T) * 8 : __builtin_clzl((ulong)(U)x) - (64 - sizeof(T) * 8)))                 \
  MSL_I1(ctz, T, (T)((U)x == 0 ? sizeof(T) * 8 : __builtin_ctzl((ulong)(U)x)))                                        \
  MSL_I2(rotate, T,                                                                                                   \
         (T)(((U)x << ((U)y & (sizeof(T) * 8 - 1))) |                                                                 \
             ((U)x >> ((sizeof(T) * 8 - ((U)y & (sizeof(T) * 8 - 1))) & (sizeof(T) * 8 - 1)))))                       \
  MSL_I2(absdiff, T, (T)(x > y ? x - y : y - x))                                                                      \
  MSL_I2(addsat, T, __builtin_elementwise_add_sat(x, y))                                                              \
  MSL_I2(subsat, T, __builtin_elementwise_sub_sat(x, y))                                                              \
  MSL_INL T extract_bits(T x, uint off, uint n)                                                                       \
      MSL_BODY(if (!n) return 0; T s = (T)((U)x << (sizeof(T) * 8 - off - n)); return (T)(s >> (sizeof(T) * 8 - n));) \
  MSL_INL T insert_bits(T b, T ins, uint off, uint n)                                                                 \
      MSL_BODY(U m = (U)((n >= sizeof(T) * 8 ? ~(U)0 : (U)(((U)1 << n) - 1)) << off);                                 \
               return (T)(((U)b & ~m) | (((U)ins << off) & m));)                                                      \
  MSL_I1(reverse_bits, T, ({                                                                                          \
           U v = (U)x;                                                                                                \
           U r = 0;                                                                                                   \
           for (unsigned i = 0; i < sizeof(T) * 8; i++) {                                                             \
             r = (U)((r << 1) | (v & 1));                                                                             \
             v >>= 1;                                                                                                 \
           }                                                                                                          \
           (T) r;                                                                                                     \
         }))
#ifdef MSL_CHECK
#undef MSL_I1
#define MSL_I1(name, T, ...) \
  MSL_INL T name(T x);       \
  MSL_VEC1(T, name, T)
#endif
MSL_INT(char, uchar)
MSL_INT(uchar, uchar)
MSL_INT(short, ushort)
MSL_INT(ushort, ushort)
MSL_INT(int, uint)
MSL_INT(uint, uint)
MSL_INT(long, ulong)
MSL_INT(ulong, ulong)
MSL_I1(abs, char, (char)(x < 0 ? -x : x))
MSL_I1(abs, short, (short)(x < 0 ? -x : x))
MSL_I1(abs, int, x < 0 ? -x : x)
MSL_INL uchar abs(uchar x) MSL_E(x)
MSL_INL ushort abs(ushort x) MSL_E(x)
MSL_INL uint abs(uint x) MSL_E(x)
MSL_INL long abs(long x) MSL_E(x < 0 ? -x : x)
MSL_INL ulong abs(ulong x) MSL_E(x)
MSL_INL int mulhi(int x, int y) MSL_E((int)(((long)x * (long)y) >> 32))
MSL_INL uint mulhi(uint x, uint y) MSL_E((uint)(((ulong)x * (ulong)y) >> 32))
MSL_INL int mad24(int x, int y, int z) MSL_E((x * y) + z)
MSL_INL uint mad24(uint x, uint y, uint z) MSL_E((x * y) + z)
MSL_INL int mul24(int x, int y) MSL_E((x * y))
MSL_INL uint mul24(uint x, uint y) MSL_E((x * y))

// The condition is a bool, or a mask: what a < b gives for vectors.
template <class T> MSL_INL T select(T a, T b, bool c) MSL_BODY(return c ? b : a;)
#ifdef MSL_RUN
template <class T, class M, int N> METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<M, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class M, int N> METAL_FUNC bool any(vec<M, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= (bool)c[i];
  return r;
}
template <class M, int N> METAL_FUNC bool all(vec<M, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= (bool)c[i];
  return r;
}
#else
template <class T, class M, int N> vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<M, N> c);
template <class M, int N> bool any(vec<M, N> c);
template <class M, int N> bool all(vec<M, N> c);
#endif
MSL_INL bool any(bool c) MSL_E(c)
MSL_INL bool all(bool c) MSL_E(c)
#ifdef MSL_RUN
METAL_FUNC uint pack_float_to_unorm4x8(float4 x) {
  uint r = 0;
  for (int i = 0; i < 4; i++) r |= (uint)__builtin_rintf(clamp(x[i], 0.0f, 1.0f) * 255.0f) << (8 * i);
  return r;
}
METAL_FUNC vec<float, 4> unpack_unorm4x8_to_float(uint x) {
  vec<float, 4> r;
  for (int i = 0; i < 4; i++) r[i] = ((x >> (8 * i)) & 255) / 255.0f;
  return r;
}
#else
uint pack_float_to_unorm4x8(vec<float, 4> x);
vec<float, 4> unpack_unorm4x8_to_float(uint x);
#endif

}  // namespace metal
