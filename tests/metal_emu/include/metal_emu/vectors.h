// Vectors, their constructors, and as_type.
#pragma once
#include "traits.h"

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T> struct __vector {
  static constexpr constant int n = 1;
  typedef T e;
};
template <class T, int N> struct __vector<T __attribute__((ext_vector_type(N)))> {
  static constexpr constant int n = N;
  typedef T e;
};
#define MSL_V(T)          \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
MSL_V(char)
MSL_V(uchar)
MSL_V(short)
MSL_V(ushort)
MSL_V(int)
MSL_V(uint)
MSL_V(long)
MSL_V(ulong)
MSL_V(half)
MSL_V(float)
MSL_V(bfloat)
#ifdef MSL_RUN
MSL_V(bool)
#endif
#undef MSL_V
#ifdef MSL_RUN
template <class T, class V, bool isv = (__vector<V>::n > 1)> struct __append {
  static inline __attribute__((always_inline)) void put(T* o, int& k, V v) { o[k++] = (T)v; }
};
template <class T, class V> struct __append<T, V, true> {
  static inline __attribute__((always_inline)) void put(T* o, int& k, V v) {
    for (int i = 0; i < __vector<V>::n; i++) o[k++] = (T)v[i];
  }
};
template <class... A> struct __components {
  static constexpr int n = 0;
};
template <class A, class... B> struct __components<A, B...> {
  static constexpr int n = __vector<A>::n + __components<B...>::n;
};
template <class T, int N, class... A> METAL_FUNC vec<T, N> __make_vector(A... a) {
  static_assert(__components<A...>::n == N || (__components<A...>::n == 1 && sizeof...(A) == 1) || sizeof...(A) == 0,
                "vector constructor: wrong number of components");
  T o[N] = {};
  int k = 0;
  int d[] = {0, (__append<T, A>::put(o, k, a), 0)...};
  (void)d;
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = o[(sizeof...(A) == 1 && k == 1) ? 0 : i];
  return r;
}
#else
template <class... A> struct __components {
  static constexpr constant int n = 0;
};
template <class A, class... B> struct __components<A, B...> {
  static constexpr constant int n = __vector<A>::n + __components<B...>::n;
};
template <class T, int N, class... A,
          class = enable_if_t<__components<A...>::n == N || (__components<A...>::n == 1 && sizeof...(A) == 1) ||
                              sizeof...(A) == 0>>
vec<T, N> __make_vector(A... a);
#endif
}  // namespace metal
// Their names are known outside of metal:: too.
using metal::vec;
#define MSL_V(T)     \
  using metal::T##2; \
  using metal::T##3; \
  using metal::T##4;
MSL_V(char)
MSL_V(uchar)
MSL_V(short)
MSL_V(ushort)
MSL_V(int)
MSL_V(uint)
MSL_V(long)
MSL_V(ulong)
MSL_V(half)
MSL_V(float)
MSL_V(bfloat)
#ifdef MSL_RUN
MSL_V(bool)
#endif
#undef MSL_V
// float4(a, b, c, d), uint2(x), ...: macros with arguments leave the plain type names alone
#define char2(...) (::metal::__make_vector<char, 2>(__VA_ARGS__))
#define char3(...) (::metal::__make_vector<char, 3>(__VA_ARGS__))
#define char4(...) (::metal::__make_vector<char, 4>(__VA_ARGS__))
#define uchar2(...) (::metal::__make_vector<uchar, 2>(__VA_ARGS__))
#define uchar3(...) (::metal::__make_vector<uchar, 3>(__VA_ARGS__))
#define uchar4(...) (::metal::__make_vector<uchar, 4>(__VA_ARGS__))
#define short2(...) (::metal::__make_vector<short, 2>(__VA_ARGS__))
#define short3(...) (::metal::__make_vector<short, 3>(__VA_ARGS__))
#define short4(...) (::metal::__make_vector<short, 4>(__VA_ARGS__))
#define ushort2(...) (::metal::__make_vector<ushort, 2>(__VA_ARGS__))
#define ushort3(...) (::metal::__make_vector<ushort, 3>(__VA_ARGS__))
#define ushort4(...) (::metal::__make_vector<ushort, 4>(__VA_ARGS__))
#define int2(...) (::metal::__make_vector<int, 2>(__VA_ARGS__))
#define int3(...) (::metal::__make_vector<int, 3>(__VA_ARGS__))
#define int4(...) (::metal::__make_vector<int, 4>(__VA_ARGS__))
#define uint2(...) (::metal::__make_vector<uint, 2>(__VA_ARGS__))
#define uint3(...) (::metal::__make_vector<uint, 3>(__VA_ARGS__))
#define uint4(...) (::metal::__make_vector<uint, 4>(__VA_ARGS__))
#define long2(...) (::metal::__make_vector<long, 2>(__VA_ARGS__))
#define long3(...) (::metal::__make_vector<long, 3>(__VA_ARGS__))
#define long4(...) (::metal::__make_vector<long, 4>(__VA_ARGS__))
#define ulong2(...) (::metal::__make_vector<ulong, 2>(__VA_ARGS__))
#define ulong3(...) (::metal::__make_vector<ulong, 3>(__VA_ARGS__))
#define ulong4(...) (::metal::__make_vector<ulong, 4>(__VA_ARGS__))
#define half2(...) (::metal::__make_vector<half, 2>(__VA_ARGS__))
#define half3(...) (::metal::__make_vector<half, 3>(__VA_ARGS__))
#define half4(...) (::metal::__make_vector<half, 4>(__VA_ARGS__))
#define float2(...) (::metal::__make_vector<float, 2>(__VA_ARGS__))
#define float3(...) (::metal::__make_vector<float, 3>(__VA_ARGS__))
#define float4(...) (::metal::__make_vector<float, 4>(__VA_ARGS__))
#define bfloat2(...) (::metal::__make_vector<bfloat, 2>(__VA_ARGS__))
#define bfloat3(...) (::metal::__make_vector<bfloat, 3>(__VA_ARGS__))
#define bfloat4(...) (::metal::__make_vector<bfloat, 4>(__VA_ARGS__))

// The same bits as another type of the same size; a vector of three has the size of four.
template <class To, class From> METAL_FUNC To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: operand and result sizes differ");
#ifdef MSL_RUN
  return __builtin_bit_cast(To, x);
#else
  return *(__private To*)(__private void*)&x;
#endif
}
