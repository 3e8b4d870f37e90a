// Type traits and numeric limits.
#pragma once
#include "dialect.h"

namespace metal {
template <class T, T v> struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> static constexpr constant bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional {
  typedef T type;
};
template <class T, class F> struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> struct remove_const {
  typedef T type;
};
template <class T> struct remove_const<const T> {
  typedef T type;
};
template <class T> struct remove_cv {
  typedef __remove_cv(T) type;
};
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_reference {
  typedef __remove_reference_t(T) type;
};
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> struct is_integral : false_type {};
template <class T> struct is_floating_point : false_type {};
#define MSL_T(T) \
  template <> struct is_integral<T> : true_type {};
MSL_T(bool)
MSL_T(char)
MSL_T(signed char)
MSL_T(uchar)
MSL_T(short)
MSL_T(ushort)
MSL_T(int)
MSL_T(uint)
MSL_T(long)
MSL_T(ulong)
#undef MSL_T
template <> struct is_floating_point<float> : true_type {};
template <> struct is_floating_point<half> : true_type {};
template <> struct is_floating_point<bfloat> : true_type {};
template <class T> struct is_signed : integral_constant<bool, (T(-1) < T(0))> {};
template <class T> struct is_unsigned : integral_constant<bool, !(T(-1) < T(0))> {};
template <class T> struct is_arithmetic
    : integral_constant<bool, is_integral<T>::value || is_floating_point<T>::value> {};
template <class T> static constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T> static constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T> static constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T> static constexpr constant bool is_signed_v = is_signed<T>::value;
template <class T> static constexpr constant bool is_unsigned_v = is_unsigned<T>::value;
template <class F, class T> struct is_convertible : integral_constant<bool, __is_convertible(F, T)> {};
template <class F, class T> static constexpr constant bool is_convertible_v = is_convertible<F, T>::value;
template <bool B> using bool_constant = integral_constant<bool, B>;
template <class... B> struct conjunction : true_type {};
template <class B> struct conjunction<B> : B {};
template <class B, class... C> struct conjunction<B, C...> : conditional_t<bool(B::value), conjunction<C...>, B> {};
template <class... B> struct disjunction : false_type {};
template <class B> struct disjunction<B> : B {};
template <class B, class... C> struct disjunction<B, C...> : conditional_t<bool(B::value), B, disjunction<C...>> {};
template <class B> struct negation : bool_constant<!bool(B::value)> {};
template <class T> struct is_pointer : false_type {};
template <class T> struct is_pointer<T*> : true_type {};
template <class T> struct is_void : is_same<void, __remove_cv(T)> {};
template <class T, class... A> struct is_constructible : bool_constant<__is_constructible(T, A...)> {};
template <class T, class... A> static constexpr constant bool is_constructible_v = is_constructible<T, A...>::value;
template <class T> struct is_default_constructible : bool_constant<__is_constructible(T)> {};
template <class T> struct is_trivial : bool_constant<__is_trivially_copyable(T)> {};
template <class T> struct remove_addrspace {
  typedef T type;
};
#ifdef MSL_CHECK
template <class T> struct remove_addrspace<device T> {
  typedef T type;
};
template <class T> struct remove_addrspace<constant T> {
  typedef T type;
};
template <class T> struct remove_addrspace<threadgroup T> {
  typedef T type;
};
#endif
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> struct add_const {
  typedef const T type;
};
template <class T, size_t N> struct array {
  T __a[N];
#ifdef MSL_RUN
  constexpr T& operator[](size_t i) { return __a[i]; }
  constexpr const T& operator[](size_t i) const { return __a[i]; }
#else
  thread T& operator[](size_t i);
  const thread T& operator[](size_t i) const;
#endif
  static constexpr size_t size() { return N; }
};

template <class T> struct numeric_limits {
  static constexpr constant bool is_specialized = false;
};
#define MSL_NLI(T, MN, MX, SG, DG)                        \
  template <> struct numeric_limits<T> {                  \
    static constexpr constant bool is_specialized = true; \
    static constexpr constant bool is_signed = SG;        \
    static constexpr constant bool is_integer = true;     \
    static constexpr constant int digits = DG;            \
    static constexpr T min() { return (T)(MN); }          \
    static constexpr T max() { return (T)(MX); }          \
    static constexpr T lowest() { return (T)(MN); }       \
  };
MSL_NLI(bool, 0, 1, false, 1)
MSL_NLI(char, -128, 127, true, 7)
MSL_NLI(signed char, -128, 127, true, 7)
MSL_NLI(uchar, 0, 255, false, 8)
MSL_NLI(short, -32768, 32767, true, 15)
MSL_NLI(ushort, 0, 65535, false, 16)
MSL_NLI(int, INT_MIN, INT_MAX, true, 31)
MSL_NLI(uint, 0, UINT_MAX, false, 32)
MSL_NLI(long, -9223372036854775807l - 1, 9223372036854775807l, true, 63)
MSL_NLI(ulong, 0, 18446744073709551615ul, false, 64)
#define MSL_NLF(T, MN, MX, EPS, DG)                                  \
  template <> struct numeric_limits<T> {                             \
    static constexpr constant bool is_specialized = true;            \
    static constexpr constant bool is_signed = true;                 \
    static constexpr constant bool is_integer = false;               \
    static constexpr constant int digits = DG;                       \
    static constexpr T min() { return (T)(MN); }                     \
    static constexpr T max() { return (T)(MX); }                     \
    static constexpr T lowest() { return (T)(-(MX)); }               \
    static constexpr T epsilon() { return (T)(EPS); }                \
    static constexpr T infinity() { return (T)__builtin_inff(); }    \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
  };
MSL_NLF(float, FLT_MIN, FLT_MAX, FLT_EPSILON, 24)
MSL_NLF(half, 6.103515625e-05f, 65504.0f, 0.0009765625f, 11)
MSL_NLF(bfloat, 1.175494351e-38f, 3.38953139e38f, 0.0078125f, 8)

template <class T> using uniform = T;
template <class T> constexpr T make_uniform(T x) { return x; }
}  // namespace metal
