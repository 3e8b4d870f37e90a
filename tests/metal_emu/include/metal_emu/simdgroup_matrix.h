// 8x8 matrices spread over the lanes of a simdgroup, two elements a lane.
#pragma once
#include "simdgroup.h"

namespace metal {
template <class T, int C = 8, int R = 8> struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8");
  vec<T, 2> __e;
#ifdef MSL_P
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T d) { int r, c; pos(r, c); __e[0] = r == c ? d : (T)0; __e[1] = r == c + 1 ? d : (T)0; }
  vec<T, 2>& thread_elements() { return __e; }
  static METAL_FUNC void pos(int& r, int& c) { int l = (int)emu_lane(), q = l / 4; r = (q & 4) + ((l / 2) % 4); c = (q & 2) * 2 + (l % 2) * 2; }
#else
  simdgroup_matrix();
  explicit simdgroup_matrix(T d);
  thread vec<T, 2>& thread_elements() thread;
#endif
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
#ifdef MSL_P
template <class T, class P> METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, P* src, ulong ld = 8, vec<ulong, 2> o = 0, bool tr = false) {
  int r, c; d.pos(r, c);
  for (int i = 0; i < 2; i++) d.__e[i] = tr ? src[(o.y + c + i) * ld + o.x + r] : src[(o.y + r) * ld + o.x + c + i]; }
template <class T, class P> METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> d, P* dst, ulong ld = 8, vec<ulong, 2> o = 0, bool tr = false) {
  int r, c; d.pos(r, c);
  for (int i = 0; i < 2; i++) { if (tr) dst[(o.y + c + i) * ld + o.x + r] = d.__e[i]; else dst[(o.y + r) * ld + o.x + c + i] = d.__e[i]; } }
struct __mma_io { float a[2], b[2], c[2], pad[2]; };
struct __mma { static void fn(const void* in, void* out, unsigned) {
  const __mma_io* x = (const __mma_io*)in; __mma_io* o = (__mma_io*)out; float A[8][8], B[8][8];
  for (int l = 0; l < 32; l++) { int q = l / 4, r = (q & 4) + ((l / 2) % 4), c = (q & 2) * 2 + (l % 2) * 2;
    for (int i = 0; i < 2; i++) { A[r][c + i] = x[l].a[i]; B[r][c + i] = x[l].b[i]; } }
  for (int l = 0; l < 32; l++) { int q = l / 4, r = (q & 4) + ((l / 2) % 4), c = (q & 2) * 2 + (l % 2) * 2;
    for (int i = 0; i < 2; i++) { float s = x[l].c[i]; for (int k = 0; k < 8; k++) s += A[r][k] * B[k][c + i]; o[l].c[i] = s; } } } };
template <class D, class A, class B, class C> METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, __METAL_SITE) {
  __mma_io v; for (int i = 0; i < 2; i++) { v.a[i] = (float)a.__e[i]; v.b[i] = (float)b.__e[i]; v.c[i] = (float)c.__e[i]; v.pad[i] = 0; }
  emu_reduce(&v, sizeof v, &__mma::fn, __METAL_PASS); d.__e[0] = (D)v.c[0]; d.__e[1] = (D)v.c[1]; }
template <class D, class A, class B> METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, __METAL_SITE) {
  simdgroup_matrix<D, 8, 8> z; z.__e = 0; simdgroup_multiply_accumulate(d, a, b, z, __METAL_PASS); }
template <class T, int C, int R> METAL_FUNC simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) { simdgroup_matrix<T, C, R> m; m.__e = v; return m; }
#else
template <class T, class P> void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, P* src, ulong ld = 8, vec<ulong, 2> o = 0, bool tr = false);
template <class T, class P> void simdgroup_store(simdgroup_matrix<T, 8, 8> d, P* dst, ulong ld = 8, vec<ulong, 2> o = 0, bool tr = false);
template <class D, class A, class B, class C> void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c);
template <class D, class A, class B> void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b);
template <class T, int C, int R> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v);
#endif

}  // namespace metal
