// 8x8 matrices spread over the lanes of a simdgroup, two elements a lane.
#pragma once
#include "simdgroup.h"

namespace metal {
template <class T, int Columns = 8, int Rows = 8> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "only 8x8");
  vec<T, 2> __elements;
#ifdef MSL_RUN
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T diagonal) {
    int row, column;
    __place((int)emu_lane(), row, column);
    __elements[0] = row == column ? diagonal : (T)0;
    __elements[1] = row == column + 1 ? diagonal : (T)0;
  }
  vec<T, 2>& thread_elements() { return __elements; }
  // Where the first of a lane's two elements lies; the second is to its right.
  static void __place(int lane, int& row, int& column) {
    int quad = lane / 4;
    row = (quad & 4) + lane / 2 % 4;
    column = (quad & 2) * 2 + lane % 2 * 2;
  }
#else
  simdgroup_matrix();
  explicit simdgroup_matrix(T diagonal);
  thread vec<T, 2>& thread_elements() thread;
#endif
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

#ifdef MSL_RUN
template <class T, class P> METAL_FUNC void simdgroup_load(simdgroup_matrix<T>& d, P* from, ulong stride = 8,
                                                           vec<ulong, 2> at = 0, bool flip = false, MSL_SITE) {
  emu_place(MSL_PASS);
  int row, column;
  d.__place((int)emu_lane(), row, column);
  for (int i = 0; i < 2; i++) {
    ulong y = flip ? column + i : row, x = flip ? row : column + i;
    d.__elements[i] = from[(at.y + y) * stride + at.x + x];
  }
}
template <class T, class P> METAL_FUNC void simdgroup_store(simdgroup_matrix<T> d, P* to, ulong stride = 8,
                                                            vec<ulong, 2> at = 0, bool flip = false, MSL_SITE) {
  emu_place(MSL_PASS);
  int row, column;
  d.__place((int)emu_lane(), row, column);
  for (int i = 0; i < 2; i++) {
    ulong y = flip ? column + i : row, x = flip ? row : column + i;
    to[(at.y + y) * stride + at.x + x] = d.__elements[i];
  }
}
struct __Product {  // a lane's elements of a, b and c; c becomes the result
  float a[2], b[2], c[2], unused[2];
  static void combine(const void* in, void* out, unsigned) {
    const __Product* from = (const __Product*)in;
    __Product* to = (__Product*)out;
    float a[8][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
      int row, column;
      simdgroup_float8x8::__place(lane, row, column);
      for (int i = 0; i < 2; i++) {
        a[row][column + i] = from[lane].a[i];
        b[row][column + i] = from[lane].b[i];
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      int row, column;
      simdgroup_float8x8::__place(lane, row, column);
      for (int i = 0; i < 2; i++) {
        float sum = from[lane].c[i];
        for (int k = 0; k < 8; k++) sum += a[row][k] * b[k][column + i];
        to[lane].c[i] = sum;
      }
    }
  }
};
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                              simdgroup_matrix<C> c, MSL_SITE) {
  __Product p = {};
  for (int i = 0; i < 2; i++) {
    p.a[i] = (float)a.__elements[i];
    p.b[i] = (float)b.__elements[i];
    p.c[i] = (float)c.__elements[i];
  }
  emu_reduce(&p, sizeof p, &__Product::combine, MSL_PASS);
  for (int i = 0; i < 2; i++) d.__elements[i] = (D)p.c[i];
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D>((D)0), MSL_PASS);
}
template <class T, int Columns, int Rows>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.__elements = value;
  return m;
}
#else
template <class T, class P>
void simdgroup_load(thread simdgroup_matrix<T>& d, P* from, ulong stride = 8, vec<ulong, 2> at = 0, bool flip = false);
template <class T, class P>
void simdgroup_store(simdgroup_matrix<T> d, P* to, ulong stride = 8, vec<ulong, 2> at = 0, bool flip = false);
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                   simdgroup_matrix<C> c);
template <class D, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b);
template <class T, int Columns, int Rows> simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value);
#endif
}  // namespace metal
