// The words of Metal in two dialects of clang, and its scalar types and constants.
// MSL_CHECK: C++ for OpenCL, to type-check; real address spaces, library functions are only declared.
// MSL_RUN: C++ for the CPU, to run; address spaces are erased.
#pragma once

#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 320
#endif
#define __METAL_MACOS__ 1
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0
#define __METAL_MAYBE_FAST_MATH__ 0

#ifdef __OPENCL_CPP_VERSION__
#define MSL_CHECK 1
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
// `constant` is a keyword already.
#define MSL_BODY(...) ;  // a function's body, if it has one here
#define MSL_INL static inline
#else
#define MSL_RUN 1
#define device
#define threadgroup
#define constant
#define thread
#define kernel
#define MSL_BODY(...) {__VA_ARGS__}
#define MSL_INL static inline __attribute__((always_inline))
#endif
#define METAL_FUNC inline __attribute__((always_inline))
// Where a simd operation or barrier is called: lanes meet if they wait at the same place.
#ifdef MSL_RUN
#define MSL_SITE int __line = __builtin_LINE(), int __column = __builtin_COLUMN(), const char *__file = __builtin_FILE()
#else
#define MSL_SITE int __line = 0, int __column = 0, int __file = 0
#endif
#define MSL_PASS __line, __column, __file

// Scalars and constants
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
#ifdef MSL_RUN
typedef _Float16 half;
constexpr half operator""h(long double x) { return (half)x; }
#endif
typedef __bf16 bfloat;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920928955e-07f
#define FLT_DIG 6
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-05f)
#define HALF_EPSILON ((half)0.0009765625f)
#define MAXHALF ((half)65504.0f)
#define CHAR_BIT 8
#define SCHAR_MAX 127
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define M_E_F 2.71828182845904523536028747135266250f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LOG10E_F 0.434294481903251827651128918916605082f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_LN10_F 2.30258509299404568401799145468436421f
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_PI_2_F 1.57079632679489661923132169163975144f
#define M_1_PI_F 0.318309886183790671537767526745028724f
#define M_2_SQRTPI_F 1.12837916709551257389615890312154517f
#define M_SQRT2_F 1.41421356237309504880168872420969808f
#define M_SQRT1_2_F 0.707106781186547524400844362104849039f
