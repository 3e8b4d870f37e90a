// Functions of floats and halfs and of their vectors.
#pragma once
#include "vectors.h"

namespace metal {
// A body that is one expression.
#ifdef MSL_RUN
#define MSL_E(...)      \
  {                     \
    return __VA_ARGS__; \
  }
#else
#define MSL_E(...) ;
#endif
// name(vector) from name(scalar), for one to three arguments of element type T; R is the result's.
#define MSL_VEC1(R, name, T)                                                             \
  MSL_INL vec<R, 2> name(vec<T, 2> x)                                                    \
      MSL_BODY(vec<R, 2> r; for (int i = 0; i < 2; i++) r[i] = name((T)x[i]); return r;) \
  MSL_INL vec<R, 3> name(vec<T, 3> x)                                                    \
      MSL_BODY(vec<R, 3> r; for (int i = 0; i < 3; i++) r[i] = name((T)x[i]); return r;) \
  MSL_INL vec<R, 4> name(vec<T, 4> x) MSL_BODY(vec<R, 4> r; for (int i = 0; i < 4; i++) r[i] = name((T)x[i]); return r;)
#define MSL_VEC2(name, T)                                                                         \
  MSL_INL vec<T, 2> name(vec<T, 2> x, vec<T, 2> y)                                                \
      MSL_BODY(vec<T, 2> r; for (int i = 0; i < 2; i++) r[i] = name((T)x[i], (T)y[i]); return r;) \
  MSL_INL vec<T, 3> name(vec<T, 3> x, vec<T, 3> y)                                                \
      MSL_BODY(vec<T, 3> r; for (int i = 0; i < 3; i++) r[i] = name((T)x[i], (T)y[i]); return r;) \
  MSL_INL vec<T, 4> name(vec<T, 4> x, vec<T, 4> y)                                                \
      MSL_BODY(vec<T, 4> r; for (int i = 0; i < 4; i++) r[i] = name((T)x[i], (T)y[i]); return r;)
#define MSL_VEC3(name, T)                                                                                  \
  MSL_INL vec<T, 2> name(vec<T, 2> x, vec<T, 2> y, vec<T, 2> z)                                            \
      MSL_BODY(vec<T, 2> r; for (int i = 0; i < 2; i++) r[i] = name((T)x[i], (T)y[i], (T)z[i]); return r;) \
  MSL_INL vec<T, 3> name(vec<T, 3> x, vec<T, 3> y, vec<T, 3> z)                                            \
      MSL_BODY(vec<T, 3> r; for (int i = 0; i < 3; i++) r[i] = name((T)x[i], (T)y[i], (T)z[i]); return r;) \
  MSL_INL vec<T, 4> name(vec<T, 4> x, vec<T, 4> y, vec<T, 4> z)                                            \
      MSL_BODY(vec<T, 4> r; for (int i = 0; i < 4; i++) r[i] = name((T)x[i], (T)y[i], (T)z[i]); return r;)
// A function of floats, and from it those of halfs and of vectors.
#define MSL_F1(name, ...)                               \
  MSL_INL float name(float x) MSL_E(__VA_ARGS__)        \
  MSL_INL half name(half x) MSL_E((half)name((float)x)) \
  MSL_VEC1(float, name, float) MSL_VEC1(half, name, half)
#define MSL_F2(name, ...)                                                 \
  MSL_INL float name(float x, float y) MSL_E(__VA_ARGS__)                 \
  MSL_INL half name(half x, half y) MSL_E((half)name((float)x, (float)y)) \
  MSL_VEC2(name, float) MSL_VEC2(name, half)
#define MSL_F3(name, ...)                                                                   \
  MSL_INL float name(float x, float y, float z) MSL_E(__VA_ARGS__)                          \
  MSL_INL half name(half x, half y, half z) MSL_E((half)name((float)x, (float)y, (float)z)) \
  MSL_VEC3(name, float) MSL_VEC3(name, half)
#define MSL_MATH_ALL                                                      \
  MSL_F1(acos, __builtin_acosf(x))                                        \
  MSL_F1(acosh, __builtin_acoshf(x))                                      \
  MSL_F1(asin, __builtin_asinf(x))                                        \
  MSL_F1(asinh, __builtin_asinhf(x))                                      \
  MSL_F1(atan, __builtin_atanf(x))                                        \
  MSL_F1(atanh, __builtin_atanhf(x))                                      \
  MSL_F1(ceil, __builtin_ceilf(x))                                        \
  MSL_F1(cos, __builtin_cosf(x))                                          \
  MSL_F1(cosh, __builtin_coshf(x))                                        \
  MSL_F1(cospi, __builtin_cosf((x * M_PI_F)))                             \
  MSL_F1(exp, __builtin_expf(x))                                          \
  MSL_F1(exp10, __builtin_powf(10.0f, x))                                 \
  MSL_F1(exp2, __builtin_exp2f(x))                                        \
  MSL_F1(fabs, __builtin_fabsf(x))                                        \
  MSL_F1(floor, __builtin_floorf(x))                                      \
  MSL_F1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f)) \
  MSL_F1(log, __builtin_logf(x))                                          \
  MSL_F1(log10, __builtin_log10f(x))                                      \
  MSL_F1(log2, __builtin_log2f(x))                                        \
  MSL_F1(rint, __builtin_rintf(x))                                        \
  MSL_F1(round, __builtin_roundf(x))                                      \
  MSL_F1(rsqrt, 1.0f / __builtin_sqrtf(x))                                \
  MSL_F1(sin, __builtin_sinf(x))                                          \
  MSL_F1(sinh, __builtin_sinhf(x))                                        \
  MSL_F1(sinpi, __builtin_sinf((x * M_PI_F)))                             \
  MSL_F1(sqrt, __builtin_sqrtf(x))                                        \
  MSL_F1(tan, __builtin_tanf(x))                                          \
  MSL_F1(tanh, __builtin_tanhf(x))                                        \
  MSL_F1(tanpi, __builtin_tanf((x * M_PI_F)))                             \
  MSL_F1(trunc, __builtin_truncf(x))                                      \
  MSL_F1(abs, __builtin_fabsf(x))                                         \
  MSL_F1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))       \
  MSL_F2(atan2, __builtin_atan2f(x, y))                                   \
  MSL_F2(fdim, __builtin_fdimf(x, y))                                     \
  MSL_F2(fmax, __builtin_fmaxf(x, y))                                     \
  MSL_F2(fmin, __builtin_fminf(x, y))                                     \
  MSL_F2(fmod, __builtin_fmodf(x, y))                                     \
  MSL_F2(pow, __builtin_powf(x, y))                                       \
  MSL_F2(powr, __builtin_powf(x, y))                                      \
  MSL_F2(max, __builtin_fmaxf(x, y))                                      \
  MSL_F2(min, __builtin_fminf(x, y))                                      \
  MSL_F2(divide, x / y)                                                   \
  MSL_F3(max3, __builtin_fmaxf(x, __builtin_fmaxf(y, z)))                 \
  MSL_F3(min3, __builtin_fminf(x, __builtin_fminf(y, z)))                 \
  MSL_F3(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z)))                \
  MSL_F3(fmin3, __builtin_fminf(x, __builtin_fminf(y, z)))                \
  MSL_F3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))
MSL_MATH_ALL
// These are in metal:: alone, not in fast:: and precise::.
MSL_F3(fma, __builtin_fmaf(x, y, z))
MSL_F3(mix, x + (y - x) * z)
MSL_F2(copysign, __builtin_copysignf(x, y))
MSL_INL float nextafter(float x, float y) MSL_E(__builtin_nextafterf(x, y))
MSL_F2(step, y < x ? 0.0f : 1.0f)
MSL_F1(sign, x > 0 ? 1.0f : (x < 0 ? -1.0f : x))
MSL_INL float __smooth(float t) MSL_E(t * t * (3.0f - 2.0f * t))
MSL_F3(smoothstep, __smooth(saturate((z - x) / (y - x))))
#define MSL_IS(name, B)                        \
  MSL_INL bool name(float x) MSL_E(B(x))       \
  MSL_INL bool name(half x) MSL_E(B((float)x)) \
  MSL_INL bool name(bfloat x) MSL_E(B((float)x))
MSL_IS(isnan, __builtin_isnan)
MSL_IS(isinf, __builtin_isinf)
MSL_IS(isfinite, __builtin_isfinite)
MSL_IS(isnormal, __builtin_isnormal)
MSL_IS(signbit, __builtin_signbit)
MSL_INL float ldexp(float x, int k) MSL_E(__builtin_ldexpf(x, k))
MSL_INL half ldexp(half x, int k) MSL_E((half)__builtin_ldexpf((float)x, k))
MSL_INL int ilogb(float x) MSL_E(__builtin_ilogbf(x))
MSL_INL float frexp(float x, thread int& e) MSL_BODY(return __builtin_frexpf(x, &e);)
MSL_INL float modf(float x, thread float& i) MSL_BODY(return __builtin_modff(x, &i);)
MSL_INL float sincos(float x, thread float& c) MSL_BODY(c = __builtin_cosf(x); return __builtin_sinf(x);)
namespace fast {
MSL_MATH_ALL
MSL_INL float sincos(float x, thread float& c) MSL_BODY(c = __builtin_cosf(x); return __builtin_sinf(x);)
}  // namespace fast
namespace precise {
MSL_MATH_ALL
MSL_INL float sincos(float x, thread float& c) MSL_BODY(c = __builtin_cosf(x); return __builtin_sinf(x);)
}  // namespace precise
#define MSL_DOT(T, N)                     \
  MSL_INL T dot(vec<T, N> x, vec<T, N> y) \
      MSL_BODY(T s = x[0] * y[0]; for (int i = 1; i < N; i++) s += x[i] * y[i]; return s;)
MSL_DOT(float, 2)
MSL_DOT(float, 3)
MSL_DOT(float, 4)
MSL_DOT(half, 2)
MSL_DOT(half, 3)
MSL_DOT(half, 4)
#define MSL_LEN(T, N) MSL_INL T length(vec<T, N> x) MSL_BODY(return sqrt(dot(x, x));)
MSL_LEN(float, 2)
MSL_LEN(float, 3)
MSL_LEN(float, 4)

}  // namespace metal
