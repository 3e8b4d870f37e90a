#pragma once
// What the kernels use of the Metal Shading Language, for CUDA (NVRTC). See mlx_turboquant/ops/cuda_text.py.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

#define METAL_FUNC __device__ __forceinline__
#define TURBOQUANT_CUDA 1

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long long ulong;
typedef __half half;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;

namespace metal {

// Vectors as Metal has them: members by letter, alignment equal to size, loads of the whole vector.
template <class T> struct alignas(2 * sizeof(T)) vec2 {
  T x, y;
  METAL_FUNC vec2() {}
  METAL_FUNC vec2(T a, T b) : x(a), y(b) {}
  METAL_FUNC T& operator[](int i) { return (&x)[i]; }
  METAL_FUNC T operator[](int i) const { return (&x)[i]; }
};
template <class T> struct alignas(4 * sizeof(T)) vec4 {
  T x, y, z, w;
  METAL_FUNC vec4() {}
  METAL_FUNC vec4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  METAL_FUNC T& operator[](int i) { return (&x)[i]; }
  METAL_FUNC T operator[](int i) const { return (&x)[i]; }
};
typedef vec2<float> float2_;
typedef vec4<float> float4_;
typedef vec2<uint> uint2_;
typedef vec4<uint> uint4_;
typedef vec4<uchar> uchar4_;
typedef vec2<ushort> ushort2_;
typedef vec4<ushort> ushort4_;

struct mem_flags {
  enum { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
};
METAL_FUNC void threadgroup_barrier(int flags) {
  if (flags & mem_flags::mem_device) __threadfence();
  __syncthreads();
}
METAL_FUNC void simdgroup_barrier(int flags) {
  if (flags & mem_flags::mem_device) __threadfence();
  __syncwarp();
}

#define TURBOQUANT_WARP 0xffffffffu
template <class T> METAL_FUNC T simd_shuffle(T v, ushort lane) { return __shfl_sync(TURBOQUANT_WARP, v, lane); }
template <class T> METAL_FUNC T simd_shuffle_xor(T v, ushort m) { return __shfl_xor_sync(TURBOQUANT_WARP, v, m); }
// Of the four lanes that begin at a multiple of 4; the index counts modulo 4.
template <class T> METAL_FUNC T quad_shuffle(T v, ushort lane) { return __shfl_sync(TURBOQUANT_WARP, v, lane, 4); }
template <class T> METAL_FUNC T simd_sum(T v) {
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(TURBOQUANT_WARP, v, m);
  return v;
}
METAL_FUNC float simd_max(float v) {
  for (int m = 16; m; m >>= 1) v = fmaxf(v, __shfl_xor_sync(TURBOQUANT_WARP, v, m));
  return v;
}
METAL_FUNC bool simd_any(bool p) { return __any_sync(TURBOQUANT_WARP, p); }

METAL_FUNC float max(float a, float b) { return fmaxf(a, b); }
METAL_FUNC float min(float a, float b) { return fminf(a, b); }
METAL_FUNC int max(int a, int b) { return a > b ? a : b; }
METAL_FUNC int min(int a, int b) { return a < b ? a : b; }
METAL_FUNC uint max(uint a, uint b) { return a > b ? a : b; }
METAL_FUNC uint min(uint a, uint b) { return a < b ? a : b; }
METAL_FUNC float abs(float a) { return fabsf(a); }
METAL_FUNC float rint(float a) { return ::rintf(a); }
METAL_FUNC float clamp(float x, float a, float b) { return fminf(fmaxf(x, a), b); }
METAL_FUNC int clamp(int x, int a, int b) { return min(max(x, a), b); }
METAL_FUNC float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
METAL_FUNC float exp(float a) { return ::expf(a); }
METAL_FUNC float exp2(float a) { return ::exp2f(a); }
METAL_FUNC float log(float a) { return ::logf(a); }
METAL_FUNC float sqrt(float a) { return ::sqrtf(a); }
METAL_FUNC float rsqrt(float a) { return ::rsqrtf(a); }
namespace fast {
METAL_FUNC float exp2(float a) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
}  // namespace fast
namespace precise {
METAL_FUNC float sqrt(float a) { return ::sqrtf(a); }
}  // namespace precise

template <class To, class From> METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct position {
  uint x, y, z;
  METAL_FUNC position(dim3 d) : x(d.x), y(d.y), z(d.z) {}
  METAL_FUNC position(::uint3 d) : x(d.x), y(d.y), z(d.z) {}
};

}  // namespace metal

#define threadgroup_position_in_grid (metal::position(blockIdx))
#define threadgroups_per_grid (metal::position(gridDim))
#define thread_index_in_threadgroup (threadIdx.x)
#define thread_index_in_simdgroup (threadIdx.x & 31u)
// Through a shuffle, so that the compiler knows that it is the same in all lanes and branches on it do not diverge.
#define simdgroup_index_in_threadgroup (__shfl_sync(TURBOQUANT_WARP, threadIdx.x >> 5, 0))
