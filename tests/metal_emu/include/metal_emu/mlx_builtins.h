// What MLX's own headers reach for behind Metal's library: bf16_math.h, logging.h.
#pragma once
#include "simdgroup.h"

namespace metal {
#define MSL_B1(n) template <class T> METAL_FUNC T __metal_##n(T x, int) MSL_BODY(return n(x);)
#define MSL_B2(n) template <class T> METAL_FUNC T __metal_##n(T x, T y, int) MSL_BODY(return n(x, y);)
#define MSL_B3(n) template <class T> METAL_FUNC T __metal_##n(T x, T y, T z, int) MSL_BODY(return n(x, y, z);)
MSL_B1(fabs)
MSL_B1(acos)
MSL_B1(acosh)
MSL_B1(asin)
MSL_B1(asinh)
MSL_B1(atan)
MSL_B1(atanh)
MSL_B1(ceil)
MSL_B1(cos)
MSL_B1(cosh)
MSL_B1(cospi)
MSL_B1(exp)
MSL_B1(exp10)
MSL_B1(exp2)
MSL_B1(floor)
MSL_B1(fract)
MSL_B1(log)
MSL_B1(log10)
MSL_B1(log2)
MSL_B1(rint)
MSL_B1(round)
MSL_B1(rsqrt)
MSL_B1(sin)
MSL_B1(sinh)
MSL_B1(sinpi)
MSL_B1(sqrt)
MSL_B1(tan)
MSL_B1(tanh)
MSL_B1(tanpi)
MSL_B1(trunc)
MSL_B2(atan2)
MSL_B2(divide)
MSL_B2(fmax)
MSL_B2(fmin)
MSL_B2(fmod)
MSL_B2(pow)
MSL_B2(powr)
MSL_B3(fmax3)
MSL_B3(fmin3)
template <class T> METAL_FUNC T __metal_fmedian3(T x, T y, T z, int) MSL_BODY(return max(min(x, y), min(max(x, y), z));)
template <class T> METAL_FUNC T __metal_nextafter(T x, T y) MSL_BODY(return nextafter(x, y);)
template <class T> METAL_FUNC T __metal_fma(T x, T y, T z) MSL_BODY(return fma(x, y, z);)
template <class T> METAL_FUNC T __metal_frexp(T x, thread int* e) MSL_BODY(return frexp(x, *e);)
template <class T> METAL_FUNC T __metal_ldexp(T x, int k, int) MSL_BODY(return ldexp(x, k);)

struct os_log {
  constexpr os_log(const constant char*, const constant char*) {}
  template <class... A> void log_debug(const constant char*, A...) const {}
};
}  // namespace metal
#ifdef MSL_RUN
#define assert(x) ((void)0)
#endif
